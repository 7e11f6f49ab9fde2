//go:build linux

package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"syscall"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
)

// layerUsage counts what the layer of an active snapshot takes. That was read before: a layer that is not there is lost only if
// it is recorded still.
func (s *Snapshotter) layerUsage(ctx context.Context, key, id string, labels map[string]string) (snapshots.Usage, error) {
	want, err := parseLabels(labels)
	if err != nil {
		return snapshots.Usage{}, err
	}
	usage, err := s.count(ctx, id, want)
	if errdefs.IsDataLoss(err) {
		if gone := s.tx(ctx, false, func(ctx context.Context) error { return sameLayer(ctx, key, id) }); gone != nil {
			err = gone
		}
	}
	return usage, err
}

func (s *Snapshotter) count(ctx context.Context, id string, want wanted) (snapshots.Usage, error) {
	if len(want.limits) > 0 {
		u, err := s.driver.Usage(id)
		return snapshots.Usage{Size: int64(u.Bytes), Inodes: int64(u.Inodes)}, s.toErrdefs(err)
	}
	usage, err := diskUsage(ctx, s.diffPath(id))
	if (err == nil || errors.Is(err, fs.ErrNotExist)) && !s.driver.Exists(id) {
		err = s.lost(id)
	}
	return usage, err
}

// diskUsage counts the blocks and inodes of a directory. A container may be at work there: what it deletes meanwhile is not
// counted, where continuity's DiskUsage would fail.
func diskUsage(ctx context.Context, dir string) (usage snapshots.Usage, err error) {
	type inode struct{ dev, ino uint64 }
	counted := map[inode]bool{} // those with several names
	err = filepath.Walk(dir, func(path string, info fs.FileInfo, err error) error {
		select {
		case <-ctx.Done():
			return ctx.Err()
		default:
		}
		if path != dir && (errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR)) {
			return nil
		}
		if err != nil {
			return err
		}
		st, ok := info.Sys().(*syscall.Stat_t)
		if !ok {
			return fmt.Errorf("%s: no inode", path)
		}
		if st.Nlink > 1 && !info.IsDir() {
			file := inode{uint64(st.Dev), st.Ino}
			if counted[file] {
				return nil
			}
			counted[file] = true
		}
		usage.Inodes++
		usage.Size += st.Blocks * 512
		return nil
	})
	return usage, err
}
