//go:build linux

package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/bcc2decd/overlay2"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

const (
	lockName   = "lock"
	formatName = "format"
	storeName  = "metadata.db"
	layersName = "layers"

	// format is the version of what lies in a root.
	format = "1"
	// storeVersion is the bucket that containerd's store keeps everything in (core/snapshots/storage/bolt.go).
	storeVersion = "v1"
)

var (
	// ErrInUse says that another process works in the root.
	ErrInUse = errors.New("root is in use")
	// ErrFormat says that the root was written by another version of this program, or by something else.
	ErrFormat = errors.New("unknown format")
	// ErrCorrupt says that the store of snapshots is damaged, or does not fit the layers. Nothing was changed.
	ErrCorrupt = errors.New("metadata is corrupt")
)

// New opens a root, makes it if it is not there, and mends what a killed process has left: layers that no snapshot is
// recorded for are removed, and so are records of snapshots whose layer a power cut took.
//
// Errors: ErrInUse, ErrFormat, ErrCorrupt; those of overlay2.New, such as overlay2.ErrIncompatibleFS.
func New(root string, opts Options) (*Snapshotter, error) {
	s, err := open(root, opts)
	if err != nil {
		return nil, fmt.Errorf("snapshotter in %s: %w", root, err)
	}
	return s, nil
}

func open(root string, opts Options) (_ *Snapshotter, err error) {
	s := &Snapshotter{opts: opts, log: opts.Log}
	if s.log == nil {
		s.log = slog.Default()
	}
	s.storeLog = driverLog(s.log)
	s.opts.MountOptions = slices.Clone(opts.MountOptions)
	if slices.Contains(opts.MountOptions, "volatile") {
		return nil, fmt.Errorf("%w: mount option volatile: a snapshot is mounted more than once", overlay2.ErrInvalidOption)
	}
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, err
	}
	if root, err = filepath.Abs(root); err != nil {
		return nil, err
	}
	if root, err = filepath.EvalSymlinks(root); err != nil {
		return nil, err
	}
	if strings.ContainsAny(root, `:,\"`) {
		return nil, fmt.Errorf(`%w: a path with one of : , \ " in it, where containerd splits mount options`, overlay2.ErrInvalidOption)
	}
	s.home = filepath.Join(root, layersName)
	if s.lock, err = lockRoot(root); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if err := checkFormat(root); err != nil {
		return nil, err
	}
	highest, err := s.checkStore(filepath.Join(root, storeName))
	if err != nil {
		return nil, err
	}
	if s.driver, err = overlay2.New(s.home, overlay2.Options{
		MountOptions: opts.MountOptions, Durability: opts.Durability, Log: s.storeLog,
	}); err != nil {
		return nil, err
	}
	if err := s.checkRemap(); err != nil {
		return nil, err
	}
	if s.store, err = storage.NewMetaStore(filepath.Join(root, storeName), func(o *bbolt.Options) error {
		o.Timeout = 10 * time.Second
		return nil
	}); err != nil {
		return nil, err
	}
	if err := s.makeEmpty(); err != nil {
		return nil, err
	}
	if err := s.reconcile(context.Background(), highest); err != nil {
		return nil, err
	}
	return s, nil
}

// lockRoot takes the root for this process, until the file is closed.
func lockRoot(root string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(root, lockName), os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		holder, _ := io.ReadAll(io.LimitReader(f, 32)) // said if it can be said
		_ = f.Close()
		return nil, fmt.Errorf("%w by process %s", ErrInUse, strings.TrimSpace(string(holder)))
	}
	if err == nil {
		err = f.Truncate(0)
	}
	if err == nil {
		_, err = fmt.Fprintln(f, os.Getpid())
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("%s: %w", f.Name(), err)
	}
	return f, nil
}

// checkFormat makes sure that the root is empty or what this version writes, and notes that.
func checkFormat(root string) error {
	path := filepath.Join(root, formatName)
	data, err := os.ReadFile(path)
	switch {
	case err == nil && strings.TrimSpace(string(data)) == format:
		return nil
	case err == nil:
		return fmt.Errorf("%w: %s says %.20q, this version knows %q", ErrFormat, path, data, format)
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	entries, err := os.ReadDir(root)
	if err != nil {
		return err
	}
	for _, e := range entries {
		// A fresh ext4 has the directory lost+found at its top, and a disk of its own may well be the root.
		if e.Name() != lockName && e.Name() != formatName+".new" && (e.Name() != "lost+found" || !e.IsDir()) {
			return fmt.Errorf("%w: %s is not there, but %s is: not a root of this program", ErrFormat, path, e.Name())
		}
	}
	return writeSynced(path, format+"\n")
}

// writeSynced replaces a file by one that is on the disk.
func writeSynced(path, content string) (err error) {
	f, err := os.OpenFile(path+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(content)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// checkStore reads all of the store, so that a damaged one is told from the rest before anything is removed because of it.
// It returns the highest number that the store has given to a snapshot.
func (s *Snapshotter) checkStore(path string) (highest uint64, err error) {
	layers, err := s.layers()
	if err != nil {
		return 0, err
	}
	st, err := os.Lstat(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}
	if empty := err != nil || st.Size() == 0; empty && len(layers) > 0 {
		return 0, fmt.Errorf("%w: %s is not there or empty, but there are %d layers: restore it, or remove the whole root to begin anew", ErrCorrupt, path, len(layers))
	} else if empty {
		return 0, nil
	}
	var recorded int
	err = guarded(func() error {
		recorded, highest, err = readStore(path)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("%w: %s: %w", ErrCorrupt, path, err)
	}
	if _, err := os.Lstat(filepath.Join(s.home, "l")); err != nil && recorded > 0 {
		return 0, fmt.Errorf("%w: %d snapshots are recorded, but %s holds no layers: is their disk mounted?", ErrCorrupt, recorded, s.home)
	}
	// A layer is made under the next number before its record is written: one more there may be.
	if n := len(layers); n > 0 && layers[n-1] > highest+1 {
		return 0, fmt.Errorf("%w: %s is older than the layers: it has recorded up to %d, there is layer %d", ErrCorrupt, path, highest, layers[n-1])
	}
	return highest, nil
}

// guarded calls f and returns as an error what it panics with, an access beyond the end of a mapped file included.
func guarded(f func() error) error {
	result := make(chan error, 1)
	go func() {
		defer func() {
			if p := recover(); p != nil {
				result <- fmt.Errorf("cannot be read: %v", p)
			}
		}()
		debug.SetPanicOnFault(true) // of this goroutine
		result <- f()
	}()
	return <-result
}

// readStore reads each key of the store, and returns how many snapshots are recorded and the highest number given.
func readStore(path string) (recorded int, highest uint64, err error) {
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: 10 * time.Second, ReadOnly: true})
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	err = db.View(func(tx *bbolt.Tx) error {
		if err := tx.ForEach(func(name []byte, b *bbolt.Bucket) error {
			if string(name) != storeVersion {
				return fmt.Errorf("%w: version %q, known is %q", ErrFormat, name, storeVersion)
			}
			return readBucket(b)
		}); err != nil {
			return err
		}
		all := tx.Bucket([]byte(storeVersion))
		if all == nil {
			return nil
		}
		snaps := all.Bucket([]byte("snapshots"))
		if snaps == nil {
			return errors.New("no bucket of snapshots")
		}
		highest = snaps.Sequence()
		return snaps.ForEachBucket(func([]byte) error { recorded++; return nil })
	})
	return recorded, highest, err
}

func readBucket(b *bbolt.Bucket) error {
	return b.ForEach(func(k, v []byte) error {
		if v != nil {
			_ = string(k) + string(v) // read them
			return nil
		}
		inner := b.Bucket(k)
		if inner == nil {
			return fmt.Errorf("%q is neither a value nor a bucket", k)
		}
		return readBucket(inner)
	})
}

// checkRemap returns an error if mounts are to have their owners mapped and cannot.
func (s *Snapshotter) checkRemap() error {
	if !s.opts.RemapIDs {
		return nil
	}
	for _, status := range s.driver.Status() {
		if status[0] == "ID-mapped Mounts" && !strings.HasPrefix(status[1], "true") {
			return fmt.Errorf("%w: id-mapped mounts: %s", overlay2.ErrNotSupported, status[1])
		}
	}
	return nil
}

// makeEmpty makes the layer that is below all others.
func (s *Snapshotter) makeEmpty() error {
	if s.driver.Exists(emptyLayer) {
		return nil
	}
	if err := s.driver.CreateReadWrite(emptyLayer, "", nil); err != nil {
		return err
	}
	if s.opts.Durability == overlay2.DurabilityOff {
		return nil
	}
	return s.driver.Sync()
}
