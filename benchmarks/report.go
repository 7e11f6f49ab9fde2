//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
)

// machine is what was measured on.
type machine struct {
	When   string `json:"when"`
	CPU    string `json:"cpu"`
	Kernel string `json:"kernel"`
	Go     string `json:"go"`
	Commit string `json:"commit"`
	// Load is the load average of the last minute: what else the machine had to do.
	Load string `json:"load"`
}

// report is a run's results and what there is to say of it.
type report struct {
	Machine machine   `json:"machine"`
	Others  []machine `json:"others,omitempty"` // of further runs that were joined
	Systems []string  `json:"systems"`
	Data    []string  `json:"data"`
	Notes   []string  `json:"notes,omitempty"`
	Results []*result `json:"results"`

	results *results
}

func cpuModel() string {
	data, err := os.ReadFile("/proc/cpuinfo")
	model := "unknown processor"
	if err == nil {
		for line := range strings.Lines(string(data)) {
			if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
				model = strings.TrimSpace(value)
				break
			}
		}
	}
	return fmt.Sprintf("%s, %d cores", model, runtime.NumCPU())
}

func (r *report) save(path string) error {
	r.Results = r.results.list
	data, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(data, '\n'), 0o644)
}

// loadReports joins the results of several runs. Values of one key are put together.
func loadReports(paths []string) (*report, error) {
	var all *report
	for _, p := range paths {
		data, err := os.ReadFile(p)
		if err != nil {
			return nil, err
		}
		r := &report{}
		if err := json.Unmarshal(data, r); err != nil {
			return nil, fmt.Errorf("%s: %w", p, err)
		}
		if all == nil {
			all = &report{Machine: r.Machine, results: newResults(context.Background())}
		} else {
			all.Others = append(all.Others, r.Machine)
		}
		all.Others = append(all.Others, r.Others...)
		all.Systems = union(all.Systems, r.Systems)
		all.Data = union(all.Data, r.Data)
		all.Notes = union(all.Notes, r.Notes)
		for _, res := range r.Results {
			all.results.add(res.key, res.Unit, res.Values...)
			all.results.wrong(res.key, res.Unit, res.Wrong)
			if res.Failed != "" {
				all.results.fail(res.key, res.Unit, errors.New(res.Failed))
			}
		}
	}
	return all, nil
}

func union(a, b []string) []string {
	for _, s := range b {
		if !slices.Contains(a, s) {
			a = append(a, s)
		}
	}
	return a
}

// columns are the systems of the report in the order of allSystems.
func (r *report) columns() []*system {
	var list []*system
	for _, s := range allSystems() {
		if slices.Contains(r.Systems, s.name) {
			list = append(list, s)
		}
	}
	return list
}

// cell is a system's value as the table shows it.
func (l *line) cell(s *system) string {
	res := l.cells[s.name]
	switch {
	case res == nil:
		return ""
	case res.Wrong != "":
		return "wrong"
	case res.Failed != "":
		return "fails"
	case len(res.Values) == 0:
		return ""
	}
	text := format(median(res.Values), l.Unit)
	if p := spread(res.Values); len(res.Values) > 2 && p >= 0.005 {
		text += fmt.Sprintf(" ±%.0f%%", 100*p)
	}
	return text
}

func format(v float64, unit string) string {
	switch unit {
	case unitTime:
		switch {
		case v < 1e6:
			return significant(v/1e3) + " µs"
		case v < 1e9:
			return significant(v/1e6) + " ms"
		}
		return significant(v/1e9) + " s"
	case unitBytes:
		return significant(v/(1<<20)) + " MiB"
	case unitRate:
		return significant(v) + "/s"
	}
	return significant(v)
}

// significant writes a number with three digits that matter.
func significant(v float64) string {
	switch {
	case v == float64(int64(v)) || v >= 100:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case v >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	return strconv.FormatFloat(v, 'f', 2, 64)
}

// grouped writes 10000 as 10,000.
func grouped(n int) string {
	s := strconv.Itoa(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// versus says how this library stands to a role's best: "3.2x moby".
func (l *line) versus(systems []*system, r role, withName bool) string {
	mine, ok := l.value("overlay2")
	best, name := l.best(systems, r)
	if !ok || name == "" || mine == 0 || best == 0 {
		return ""
	}
	text := strconv.FormatFloat(l.ratio(mine, best), 'g', 2, 64) + "x"
	if ratio := l.ratio(mine, best); ratio >= 0.1 {
		text = significant(ratio) + "x"
	}
	if withName {
		text += " " + name
	}
	return text
}

// table is the results as a Markdown table, one for each filesystem and one without.
func (r *report) table() string {
	var b strings.Builder
	systems := r.columns()
	byFS := map[string][]*line{}
	var order []string
	for _, l := range r.results.lines() {
		if byFS[l.FS] == nil {
			order = append(order, l.FS)
		}
		byFS[l.FS] = append(byFS[l.FS], l)
	}
	slices.SortStableFunc(order, func(a, b string) int { return fsRank(a) - fsRank(b) })
	for _, fs := range order {
		fmt.Fprintf(&b, "\n### %s\n\n| job |", fsTitle(fs))
		for _, s := range systems {
			fmt.Fprintf(&b, " %s |", s.name)
		}
		b.WriteString(" against the best peer | against the limit |\n|---|" + strings.Repeat("--:|", len(systems)+2) + "\n")
		for _, l := range byFS[fs] {
			name := l.Row
			if l.Data != "" {
				name += ", " + l.Data
			}
			fmt.Fprintf(&b, "| %s |", name)
			for _, s := range systems {
				fmt.Fprintf(&b, " %s |", l.cell(s))
			}
			fmt.Fprintf(&b, " %s | %s |\n", l.versus(systems, peer, true), l.versus(systems, limits, false))
		}
	}
	return b.String()
}

func fsRank(fs string) int { return slices.Index([]string{"tmpfs", "ext4", "xfs", ""}, fs) }

func fsTitle(fs string) string {
	switch fs {
	case "":
		return "As a dependency"
	case "tmpfs":
		return "In memory (tmpfs)"
	}
	return "On " + fs + " (a new one for each run, its image in memory)"
}

// behind lists the rows in which this library is not the best, so that nobody has to
// look for them.
func (r *report) behind() string {
	var b strings.Builder
	systems := r.columns()
	for _, l := range r.results.lines() {
		mine, ok := l.value("overlay2")
		best, name := l.best(systems, peer)
		if ok && name != "" && l.better(best, mine) < 0 {
			fmt.Fprintf(&b, "- %s: %s, %s has %s\n", l.where(), format(mine, l.Unit), name, format(best, l.Unit))
		}
	}
	return b.String()
}

// where is the row's whole name.
func (l *line) where() string { return joined(l.Row, l.Data, l.FS) }

func joined(words ...string) string {
	return strings.Join(slices.DeleteFunc(words, func(s string) bool { return s == "" }), ", ")
}

// failures lists what was wrong or failed, which the table has no room for.
func (r *report) failures() string {
	var b strings.Builder
	for _, res := range r.results.list {
		what, why := "fails", res.Failed
		if res.Wrong != "" {
			what, why = "gives a wrong answer", res.Wrong
		}
		if why != "" {
			fmt.Fprintf(&b, "- %s %s at %s: %s\n", res.System, what, joined(res.Row, res.Data, res.FS), shorten(why, 240))
		}
	}
	for _, n := range r.Notes {
		fmt.Fprintf(&b, "- %s\n", shorten(n, 240))
	}
	return b.String()
}

// ownFaults is an error if this library gave a wrong answer or none. What peers do wrong
// is a result like others.
func (r *report) ownFaults() error {
	var err error
	for _, res := range r.results.list {
		if res.System == "overlay2" && res.Wrong+res.Failed != "" {
			err = errors.Join(err, fmt.Errorf("overlay2: %s: %s", res.Row, res.Wrong+res.Failed))
		}
	}
	return err
}

func shorten(s string, n int) string {
	s = strings.Join(strings.Fields(s), " ")
	if len(s) > n {
		return strings.ToValidUTF8(s[:n], "") + "..."
	}
	return s
}

// text is the whole generated part.
func (r *report) text() string {
	var b strings.Builder
	for _, m := range append([]machine{r.Machine}, r.Others...) {
		fmt.Fprintf(&b, "- %s UTC, %s, %s, %s, commit %s, load %s at the start\n", m.When, m.CPU, m.Kernel, m.Go, m.Commit, m.Load)
	}
	if len(r.Data) > 0 {
		b.WriteString("\nData (sha256, bytes, entries):\n\n```\n" + strings.Join(r.Data, "\n") + "\n```\n")
	}
	b.WriteString(r.table())
	if a := r.behind(); a != "" {
		b.WriteString("\n### Where a peer is ahead\n\n" + a)
	}
	if f := r.failures(); f != "" {
		b.WriteString("\n### What failed or was wrong\n\n" + f)
	}
	return b.String()
}

const (
	markBegin = "<!-- generated: begin -->"
	markEnd   = "<!-- generated: end -->"
)

// write replaces what stands between the marks of performance.md, and the picture.
func (r *report) write(docs string) error {
	path := filepath.Join(docs, "performance.md")
	old, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	before, rest, ok := strings.Cut(string(old), markBegin)
	_, after, ok2 := strings.Cut(rest, markEnd)
	if !ok || !ok2 {
		return fmt.Errorf("%s: the marks %s and %s are missing", path, markBegin, markEnd)
	}
	page := before + markBegin + "\n" + r.text() + "\n" + markEnd + after
	return errors.Join(
		os.WriteFile(path, []byte(page), 0o644),
		os.WriteFile(filepath.Join(docs, "performance.svg"), []byte(r.chart()), 0o644),
	)
}
