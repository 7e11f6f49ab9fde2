//go:build linux

package main

import (
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
)

// progress draws bars on a terminal, and nothing elsewhere.
type progress struct{ bars *mpb.Progress }

// bar is one piece of work. The zero value draws nothing.
type bar struct{ bar *mpb.Bar }

func (a *app) newProgress() *progress {
	if a.quiet || !isTerminal(a.err) {
		return &progress{}
	}
	return &progress{mpb.New(mpb.WithOutput(a.err), mpb.WithWidth(64), mpb.WithRefreshRate(120*time.Millisecond))}
}

// add begins a bar of total bytes; total 0 is unknown.
func (p *progress) add(name string, total int64) bar {
	if p.bars == nil {
		return bar{}
	}
	return bar{p.bars.AddBar(max(total, 0),
		mpb.PrependDecorators(decor.Name(name, decor.WC{W: 14, C: decor.DindentRight}), decor.CountersKibiByte("% 8.1f / % 8.1f")),
		mpb.AppendDecorators(decor.Percentage(decor.WC{W: 5}), decor.AverageSpeed(decor.SizeB1024(0), " % .1f")),
	)}
}

// set tells how many bytes are done.
func (b bar) set(n int64) {
	if b.bar != nil {
		b.bar.SetCurrent(n)
	}
}

// done ends a bar: full if the work ended well.
func (b bar) done(err error) {
	switch {
	case b.bar == nil:
	case err != nil:
		b.bar.Abort(false)
	default:
		b.bar.SetTotal(-1, true)
	}
}

// wait ends the drawing.
func (p *progress) wait() {
	if p.bars != nil {
		p.bars.Wait()
	}
}
