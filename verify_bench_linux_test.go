package overlay2

import (
	"testing"
)

// BenchmarkDriverApplyDiffRecord is BenchmarkDriverApplyDiff with Options.RecordDigests.
func BenchmarkDriverApplyDiffRecord(b *testing.B) {
	d := benchDriver(b)
	d.opts.RecordDigests = true
	data := benchTar(b)
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		apply(b, d, "layer", "", data)
		must(b, d.Remove("layer"))
	}
}

func BenchmarkDriverVerify(b *testing.B) {
	d := benchDriver(b)
	d.opts.RecordDigests = true
	data := benchTar(b)
	apply(b, d, "layer", "", data)
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		must(b, d.Verify(b.Context(), "layer", func(diff Difference) { b.Error(diff) }))
	}
}
