package overlay2

import (
	"errors"
	"fmt"
	"testing"
	"time"
)

// BenchmarkDriverScale measures each call in homes of ever more layers, all children of one. It reports the
// medians in microseconds. The homes lie in memory: the largest takes some 2 GB.
//
//	go test -run '^$' -bench DriverScale -benchtime 300x .
func BenchmarkDriverScale(b *testing.B) {
	for _, layers := range []int{10, 10_000, 100_000} {
		b.Run(sizeName(layers), func(b *testing.B) {
			d := benchDriver(b)
			must(b, d.Create("base", "", nil))
			for i := range layers {
				must(b, d.Create(fmt.Sprint("layer", i), "base", nil))
			}
			must(b, d.Sync())
			d.trash.wait()
			b.ResetTimer()
			calls := []struct {
				name string
				do   func() error
			}{
				{"create", func() error { return d.Create("parent", "base", nil) }},
				{"create-child", func() error { return d.CreateReadWrite("box", "parent", nil) }},
				{"get", func() error { return errOf2(d.Get("box", "")) }},
				{"put", func() error { return d.Put("box") }},
				{"exists", func() error { d.Exists("box"); return nil }},
				{"remove-refused", func() error {
					if err := d.Remove("base"); !errors.Is(err, ErrLayerInUse) {
						return fmt.Errorf("a layer with children: %w", err)
					}
					return nil
				}},
				{"remove", func() error { return d.Remove("box") }},
				{"remove-committed", func() error { return d.Remove("parent") }},
			}
			times := make([][]time.Duration, len(calls))
			for b.Loop() {
				for i, c := range calls {
					start := time.Now()
					must(b, c.do())
					times[i] = append(times[i], time.Since(start))
				}
				d.trash.wait()
			}
			var opened []time.Duration
			for range 5 {
				start := time.Now()
				again, err := New(d.home, Options{})
				must(b, err)
				opened = append(opened, time.Since(start))
				must(b, again.Cleanup())
			}
			b.ReportMetric(float64(median(opened).Nanoseconds())/1e3, "new-us")
			for i, c := range calls {
				b.ReportMetric(float64(median(times[i]).Nanoseconds())/1e3, c.name+"-us")
			}
			b.ReportMetric(0, "ns/op")
		})
	}
}
