package archive

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// benchUpper makes a layer that modifies n of the files that benchTree makes.
func benchUpper(b *testing.B, low string, n int) string {
	up := b.TempDir()
	seen := 0
	err := filepath.WalkDir(low, func(path string, e os.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() || seen == n {
			return err
		}
		seen++
		if seen%3 != 0 {
			return nil
		}
		to := filepath.Join(up, path[len(low):])
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return err
		}
		return os.WriteFile(to, fmt.Append(nil, "changed ", seen), 0o644)
	})
	if err != nil {
		b.Fatal(err)
	}
	return up
}

func BenchmarkChanges(b *testing.B) {
	low := benchTree(b)
	up := benchUpper(b, low, 3000)
	run := func(name, dir string, lowers ...string) {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := Changes(context.Background(), dir, ReadOptions{Lowers: lowers}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	run("whole", low)
	run("modified", up, low)
	b.Run("diff", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			r, err := Pack(context.Background(), up, PackOptions{Lowers: []string{low}})
			if err != nil {
				b.Fatal(err)
			}
			if _, err := r.WriteTo(discard{}); err != nil {
				b.Fatal(err)
			}
			_ = r.Close()
		}
	})
	b.Run("compare", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := Compare(context.Background(), low, low); err != nil {
				b.Fatal(err)
			}
		}
	})
}

type discard struct{}

func (discard) Write(b []byte) (int, error) { return len(b), nil }
