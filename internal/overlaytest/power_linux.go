package overlaytest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// fsShutdown is FS_IOC_SHUTDOWN of ext4, and XFS_IOC_GOINGDOWN.
const fsShutdown = 0x8004587d

// shutdownNoFlush stops a filesystem at once: what is in memory only, its log too, is lost.
const shutdownNoFlush = 2

// Power is a filesystem whose power can be cut.
type Power struct {
	// Dir is where it is mounted.
	Dir  string
	name string
	dev  *os.File // keeps the device attached while nothing is mounted
}

// NewPower makes an ext4 or xfs filesystem that lives as long as the test.
func NewPower(t testing.TB, name string) *Power {
	t.Helper()
	Require(t, name)
	dir, err := os.MkdirTemp("", fmt.Sprintf("overlaytest-%d-", os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	p := &Power{Dir: filepath.Join(dir, name), name: name}
	t.Cleanup(func() {
		err := umountBelow(dir)
		if p.dev != nil {
			err = errors.Join(err, p.dev.Close())
		}
		if err := errors.Join(err, os.RemoveAll(dir)); err != nil {
			t.Error(err)
		}
	})
	if err := p.make(); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *Power) make() error {
	img, err := image(400 << 20)
	if err != nil {
		return err
	}
	defer os.Remove(img)
	if out, err := exec.Command("mkfs."+p.name, append(mkfsArgs(p.name), img)...).CombinedOutput(); err != nil {
		return fmt.Errorf("mkfs.%s: %w: %s", p.name, err, out)
	}
	if p.dev, err = attach(img); err != nil {
		return fmt.Errorf("attach a loop device: %w", err)
	}
	if err := os.Mkdir(p.Dir, 0o755); err != nil {
		return err
	}
	return p.mount()
}

func (p *Power) mount() error {
	if err := unix.Mount(p.dev.Name(), p.Dir, p.name, 0, ""); err != nil {
		return fmt.Errorf("mount %s: %w", p.dev.Name(), err)
	}
	return nil
}

// Cut cuts the power: what is not on the disk at this moment is lost, and every later write
// fails. Call it while others write.
func (p *Power) Cut(t testing.TB) {
	t.Helper()
	fd, err := unix.Open(p.Dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.IoctlSetPointerInt(fd, fsShutdown, shutdownNoFlush); err != nil {
		t.Fatalf("shutdown: %v", err)
	}
}

// Restore mounts the filesystem again, as after a reboot. Nothing may be open there.
func (p *Power) Restore(t testing.TB) {
	t.Helper()
	var err error
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		// Not detached: the same filesystem, dead as it is, would be mounted again. That happens too while
		// another process's mount namespace, made meanwhile, still has it; and a mount of a layer may still be going away.
		if err = umountBelow(p.Dir); err == nil {
			err = unix.Unmount(p.Dir, unix.UMOUNT_NOFOLLOW)
		}
		if err != nil && err != unix.EINVAL { // EINVAL: not mounted since the last attempt
			continue
		}
		if err = p.mount(); err != nil {
			continue
		}
		if err = p.alive(); err == nil {
			return
		}
	}
	t.Fatalf("restore: %v", err)
}

// alive tells whether the filesystem can be written.
func (p *Power) alive() error {
	f, err := os.CreateTemp(p.Dir, ".alive-")
	if err != nil {
		return err
	}
	return errors.Join(f.Close(), os.Remove(f.Name()))
}
