//go:build linux

package main

import (
	"fmt"
	"strings"
)

// chartRows are the rows of the picture: the first of their kind in the results.
func chartRows() []string {
	return []string{
		rowApply, rowDiff, rowDiffPipe, rowDiffSize, rowChanges, rowFewChanges, rowFewDiff,
		rowCreate, rowGetPut(16), rowGetPut(127), rowRemove, rowNew(10_000), rowApplyCPU, rowApplyPeak,
	}
}

const (
	chartWidth = 900
	chartLabel = 250
	chartBar   = 11
	chartScale = 130 // pixels for the best peer's time
	chartMost  = 4.2 // times the best peer's; what is longer is cut, with the number of times in brackets
)

// chart draws each row's values, the best peer's being 1. Shorter is better.
func (r *report) chart() string {
	systems := r.columns()
	var shown []*system
	for _, s := range systems {
		if s.role != tool {
			shown = append(shown, s)
		}
	}
	colours := map[string]string{
		"overlay2": "#0b6e4f", "moby": "#7a9cc6", "c/storage": "#b497bd", "containerd": "#d9a566",
		"limit1": "#c9c9c9", "limitN": "#9e9e9e",
	}
	var body strings.Builder
	y := 64
	for _, row := range chartRows() {
		l := r.find(row)
		if l == nil {
			continue
		}
		unit, _ := l.best(systems, peer)
		if unit == 0 {
			continue
		}
		y += r.group(&body, l, shown, colours, unit, y) + 12
	}
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="12">`+"\n", chartWidth, y+10)
	fmt.Fprintf(&b, `<rect width="100%%" height="100%%" fill="#ffffff"/>`+"\n")
	fmt.Fprintf(&b, `<text x="10" y="22" font-size="15" font-weight="bold">The best peer is 1, at the dashed line; shorter is better</text>`+"\n")
	x := 10
	for _, s := range shown {
		fmt.Fprintf(&b, `<rect x="%d" y="34" width="12" height="12" fill="%s"/><text x="%d" y="44">%s</text>`+"\n", x, colours[s.name], x+16, s.name)
		x += 34 + 8*len(s.name)
	}
	fmt.Fprintf(&b, `<line x1="%[1]d" y1="56" x2="%[1]d" y2="%[2]d" stroke="#444444" stroke-dasharray="3 3"/>`+"\n", chartLabel+chartScale, y)
	b.WriteString(body.String())
	b.WriteString("</svg>\n")
	return b.String()
}

// find returns the first line of a row that this library and a peer both have.
func (r *report) find(row string) *line {
	for _, l := range r.results.lines() {
		if _, ok := l.value("overlay2"); ok && l.Row == row {
			return l
		}
	}
	return nil
}

// group draws one row's bars and returns their height.
func (r *report) group(b *strings.Builder, l *line, systems []*system, colours map[string]string, unit float64, y int) int {
	where := l.FS
	if l.Data != "" {
		where = l.Data + ", " + l.FS
	}
	height := 0
	for _, s := range systems {
		v, ok := l.value(s.name)
		if !ok {
			continue
		}
		times := v / unit
		note := format(v, l.Unit)
		if times > chartMost {
			note += fmt.Sprintf(" (%.0f)", times)
		}
		width := max(1, min(times, chartMost)*chartScale)
		fmt.Fprintf(b, `<rect x="%d" y="%d" width="%.1f" height="%d" fill="%s"/>`, chartLabel, y+height, width, chartBar-1, colours[s.name])
		fmt.Fprintf(b, `<text x="%.1f" y="%d" font-size="9" fill="#333333">%s</text>`+"\n", chartLabel+width+4, y+height+chartBar-3, note)
		height += chartBar
	}
	fmt.Fprintf(b, `<text x="%d" y="%d" text-anchor="end">%s</text>`, chartLabel-8, y+10, l.Row)
	fmt.Fprintf(b, `<text x="%d" y="%d" text-anchor="end" font-size="9" fill="#666666">%s</text>`+"\n", chartLabel-8, y+22, where)
	return max(height, 26)
}
