//go:build linux

package main

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sync"
)

// Units of a row's values.
const (
	unitTime  = "ns"
	unitBytes = "B"
	unitRate  = "/s"
	unitCalls = "calls"
	unitCount = ""
)

// key names the values of one system in one row.
type key struct {
	Row    string `json:"row"`
	Data   string `json:"data,omitempty"`
	FS     string `json:"fs,omitempty"`
	System string `json:"system"`
}

// result is what the runs of one key gave.
type result struct {
	key
	Unit   string    `json:"unit"`
	Values []float64 `json:"values,omitempty"`
	// Wrong says how an answer was wrong: its time doesn't count.
	Wrong string `json:"wrong,omitempty"`
	// Failed says why there is no answer.
	Failed string `json:"failed,omitempty"`
}

// results collects. Its order is that in which rows came up first.
type results struct {
	ctx  context.Context // the run's
	mu   sync.Mutex
	list []*result
	byID map[key]*result
}

func newResults(ctx context.Context) *results {
	return &results{ctx: ctx, byID: map[key]*result{}}
}

func (r *results) get(k key, unit string) *result {
	if found := r.byID[k]; found != nil {
		return found
	}
	added := &result{key: k, Unit: unit}
	r.byID[k] = added
	r.list = append(r.list, added)
	return added
}

func (r *results) add(k key, unit string, values ...float64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	res := r.get(k, unit)
	res.Values = append(res.Values, values...)
}

func (r *results) wrong(k key, unit, why string) {
	if why == "" {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.get(k, unit).Wrong = why
}

func (r *results) fail(k key, unit string, err error) {
	// What fails because the run was interrupted is nobody's fault.
	if err == nil || errors.Is(err, errNoCounterpart) || r.ctx.Err() != nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.get(k, unit).Failed = err.Error()
}

// median of values that are not empty.
func median(values []float64) float64 { return quantile(values, 0.5) }

// spread is half the distance between the quartiles, relative to the median.
func spread(values []float64) float64 {
	m := median(values)
	if m == 0 {
		return 0
	}
	return (quantile(values, 0.75) - quantile(values, 0.25)) / 2 / m
}

func quantile(values []float64, q float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	at := q * float64(len(sorted)-1)
	low := int(at)
	high := min(low+1, len(sorted)-1)
	return sorted[low] + (sorted[high]-sorted[low])*(at-float64(low))
}

// line is one row of a table: what each system gave for it.
type line struct {
	Row, Data, FS, Unit string
	cells               map[string]*result
}

// lines puts the results of a row together, in the order the rows came up.
func (r *results) lines() []*line {
	var list []*line
	byKey := map[key]*line{}
	for _, res := range r.list {
		k := key{Row: res.Row, Data: res.Data, FS: res.FS}
		l := byKey[k]
		if l == nil {
			l = &line{Row: res.Row, Data: res.Data, FS: res.FS, Unit: res.Unit, cells: map[string]*result{}}
			byKey[k] = l
			list = append(list, l)
		}
		l.cells[res.System] = res
	}
	return list
}

// value returns a system's median; no value, a wrong answer and a failure have none.
func (l *line) value(system string) (float64, bool) {
	res := l.cells[system]
	if res == nil || len(res.Values) == 0 || res.Wrong != "" || res.Failed != "" {
		return 0, false
	}
	return median(res.Values), true
}

// better compares two values of the row: the first is better if the result is negative.
func (l *line) better(a, b float64) int {
	if l.Unit == unitRate {
		return cmp.Compare(b, a)
	}
	return cmp.Compare(a, b)
}

// best returns the best value among systems of a role.
func (l *line) best(systems []*system, r role) (value float64, name string) {
	for _, s := range systems {
		if v, ok := l.value(s.name); ok && s.role == r && (name == "" || l.better(v, value) < 0) {
			value, name = v, s.name
		}
	}
	return value, name
}

// ratio says how many times better a is than b.
func (l *line) ratio(a, b float64) float64 {
	if l.Unit == unitRate {
		return a / b
	}
	return b / a
}
