package overlay2

import (
	"fmt"
	"strings"
	"testing"
)

// TestFitting: how many layers go into mount(2)'s page, whatever its size, by absolute and by
// relative names, and that it is never a byte more than the kernel reads.
func TestFitting(t *testing.T) {
	for _, c := range []struct {
		page, prefix int // bytes
		most         int // layers that fit: by hand, (page - 102 - 2 prefix) / (29 + prefix)
	}{
		{4 << 10, 0, 137}, {4 << 10, 10, 101}, {4 << 10, 100, 29}, {4 << 10, 1000, 1},
		{16 << 10, 0, 500}, {16 << 10, 10, 416}, {16 << 10, 100, 124}, {16 << 10, 1000, 13},
		{64 << 10, 0, 500}, {64 << 10, 10, 500}, {64 << 10, 100, 500}, {64 << 10, 1000, 61},
	} {
		t.Run(fmt.Sprintf("%d/%d", c.page, c.prefix), func(t *testing.T) {
			prefix := strings.Repeat("p", c.prefix)
			most := 0
			for n := 1; n <= maxLowers; n++ {
				s := mountSpec{dir: linkPrefix, upper: linkPrefix + linkA, work: linkPrefix + linkA + "/../" + workName, options: []string{"index=off"}}
				for range n {
					s.lowers = append(s.lowers, linkA)
				}
				data, ok := s.fitting(prefix, c.page-1)
				if !ok {
					continue
				}
				if most = n; len(data) > c.page-1 || data != s.data(prefix) || strings.Count(data, linkPrefix+linkA+":") != n-1 {
					t.Fatalf("%d layers: %d bytes", n, len(data))
				}
			}
			if most != c.most {
				t.Errorf("%d layers fit, want %d", most, c.most)
			}
			if c.prefix == 0 && most < legacyLowers(c.page) {
				t.Errorf("%d layers fit, %d were promised", most, legacyLowers(c.page))
			}
		})
	}
}
