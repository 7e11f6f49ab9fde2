package overlay2

import (
	"fmt"
	"slices"
	"time"

	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// forkedAt returns since when the trees of two layers may differ: the time at which the first of those layers was made
// that only one of them has in its chain. It is zero where the filesystem doesn't keep times of birth.
func (d *Driver) forkedAt(id, other string) (time.Time, error) {
	one, err := d.chainOf(id)
	if err != nil {
		return time.Time{}, err
	}
	two, err := d.chainOf(other)
	if err != nil {
		return time.Time{}, err
	}
	var first time.Time
	for _, c := range []struct{ ids, others []string }{{one, two}, {two, one}} {
		for _, layer := range c.ids {
			if slices.Contains(c.others, layer) {
				continue
			}
			born, known, err := sys.Birth(unix.AT_FDCWD, sys.MakeName(diffPaths(d.home, []string{layer})[0]))
			if err != nil {
				return time.Time{}, fmt.Errorf("layer %s: %w", layer, err)
			}
			if !known {
				return time.Time{}, nil
			}
			if at := time.Unix(born.Sec, int64(born.Nsec)); first.IsZero() || at.Before(first) {
				first = at
			}
		}
	}
	return first, nil
}

// chainOf returns a layer and those below it, nearest first.
func (d *Driver) chainOf(id string) ([]string, error) {
	l, err := openLayer(d.home, id)
	if err != nil {
		return nil, err
	}
	defer l.close()
	ids, err := d.ancestors(l)
	if err != nil {
		return nil, err
	}
	return append([]string{id}, ids...), nil
}
