//go:build linux

package overlay2

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

var (
	// minKernel is the first kernel with several lower layers (4.0).
	minKernel = sys.KernelVersion{Major: 4, Minor: 0}
	// minKernelBtrfs is the first one on which btrfs clears a whiteout's directory right (moby#27358).
	minKernelBtrfs = sys.KernelVersion{Major: 4, Minor: 7}
)

// answer is what a probe found out.
type answer uint8

const (
	unknown answer = iota
	no
	yes
)

func (a answer) String() string {
	switch a {
	case yes:
		return "true"
	case no:
		return "false"
	}
	return "unknown"
}

func answerOf(b bool) answer {
	if b {
		return yes
	}
	return no
}

// facts are what this kernel and the home's filesystem can do. They are found out once, in New.
type facts struct {
	backingFS string
	// dType: readdir tells the type of an entry.
	dType answer
	// indexOff: the option index exists and is to be switched off, as layers are moved
	// between mounts (4.13).
	indexOff bool
	// userxattr: trusted.* is not permitted here (user namespace; 5.11, commit 2d2f2d7322ff).
	userxattr bool
	// opaqueRight: a directory copied up is not marked opaque by mistake (fixed in 4.8, commit 0956254a2d5b).
	opaqueRight answer
	// redirectDir: renamed directories of lower layers carry a redirect (4.10, commit a6c606551141).
	redirectDir answer
	// metacopy: a change of metadata copies no data up (4.19, commit d5791044d2e5).
	metacopy answer
	// fineTimes: each change of a directory has a time of its own (6.13, multigrain timestamps).
	fineTimes bool
	// newAPI: layers are taken one by one, by name (lowerdir+ of fsconfig: 6.7, commit 24e16e385f22).
	newAPI    answer
	newAPIErr error // why not
	// descriptors: mount(2) takes numbers of open directories for names.
	descriptors    answer
	descriptorsErr error // why not
	// files: an overlay's layers can be given as open files (6.13). Found out only for MountFiles.
	files    answer
	filesErr error // why not
}

// nativeDiff reports whether an upper directory tells all that changed.
func (f facts) nativeDiff() bool { return f.opaqueRight == yes }

// mountOptions returns the options that every mount here gets.
func (f facts) mountOptions() []string {
	var options []string
	if f.indexOff {
		options = append(options, "index=off")
	}
	if f.userxattr {
		options = append(options, "userxattr")
	}
	return options
}

// probeHome finds out the facts in the home. On a full disk what was removed and not deleted yet goes first.
func (d *Driver) probeHome() (facts, error) {
	dir := filepath.Join(d.home, stagingDir)
	f, err := probe(dir, d.opts)
	if !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
		return f, err
	}
	if err2 := errors.Join(d.openQuota(), d.recoverStaging()); err2 != nil {
		return f, errors.Join(err, err2)
	}
	d.trash.wait()
	return probe(dir, d.opts)
}

// probe finds out the facts with a mount of two lower layers below dir, which lies in the
// home. An overlay that cannot be mounted is ErrNotSupported or ErrIncompatibleFS.
func probe(dir string, opts Options) (f facts, err error) {
	kernel, err := sys.Kernel()
	if err != nil {
		return facts{}, err
	}
	if f.backingFS, err = backingFS(dir); err != nil {
		return facts{}, err
	}
	if err := checkKernel(kernel, f.backingFS); err != nil && !opts.OverrideKernelCheck {
		return facts{}, err
	}
	// The parameter stands for the option: both came with 4.13.
	if _, err := os.Stat("/sys/module/overlay/parameters/index"); err == nil {
		f.indexOff = !hasOption(opts.MountOptions, "index")
	}

	tmp := filepath.Join(dir, "probe-"+rand.Text())
	if err := os.Mkdir(tmp, 0o700); err != nil {
		return facts{}, err
	}
	defer func() { err = errors.Join(err, removeProbe(dir, filepath.Base(tmp))) }()
	if err := f.probeLayers(tmp, opts); err != nil {
		return facts{}, fmt.Errorf("overlay on %s: %w", f.backingFS, err)
	}
	return f, nil
}

// checkKernel refuses kernels on which layers were damaged.
func checkKernel(kernel sys.KernelVersion, backingFS string) error {
	if kernel.Less(minKernel) {
		return unsupported("kernel %s is older than %s", kernel, minKernel)
	}
	if backingFS == "btrfs" && kernel.Less(minKernelBtrfs) {
		return fmt.Errorf("%w: btrfs needs kernel %s, this is %s", ErrIncompatibleFS, minKernelBtrfs, kernel)
	}
	return nil
}

// backingFS returns the name of the filesystem that dir lies on.
func backingFS(dir string) (string, error) {
	fd, err := sys.OpenRoot(dir)
	if err != nil {
		return "", err
	}
	name, err := sys.FSName(fd)
	return name, errors.Join(err, sys.Close(fd))
}

// removeProbe removes what a probe left, its mount included.
func removeProbe(dir, name string) error {
	if err := sys.Unmount(filepath.Join(dir, name, mergedName)); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	fd, err := sys.OpenRoot(dir)
	if err != nil {
		return err
	}
	return errors.Join(sys.RemoveAllAt(fd, name), sys.Close(fd))
}

// probeLayers makes the layers
//
//	l2/diff: d/sub, file     l1/diff: empty     up/diff: empty
//
// mounts them in tmp, works in the mount, and reads what that left in upper.
func (f *facts) probeLayers(tmp string, opts Options) error {
	for _, dir := range []string{"l1/diff", "l2/diff/d/sub", "up/diff", "up/work", mergedName} {
		if err := os.MkdirAll(filepath.Join(tmp, dir), 0o755); err != nil {
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(tmp, "l2/diff/file"), []byte("x"), 0o600); err != nil {
		return err
	}
	if err := f.probeDType(tmp); err != nil {
		return err
	}
	err := unix.Lsetxattr(filepath.Join(tmp, "l2/diff/d"), "trusted.overlay.opaque", []byte("y"), 0)
	switch {
	case err == unix.EPERM:
		f.userxattr = true
		err = unix.Lsetxattr(filepath.Join(tmp, "l2/diff/d"), "user.overlay.opaque", []byte("y"), 0)
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("%w: no extended attributes: %w", ErrIncompatibleFS, err)
	}
	if err != nil {
		return fmt.Errorf("set xattr: %w", err)
	}
	spec := mountSpec{
		home:    tmp,
		lowers:  []string{"l1/diff", "l2/diff"},
		upper:   "up/diff",
		work:    "up/work",
		options: append(f.mountOptions(), opts.MountOptions...),
	}
	if err := f.checkUserOptions(opts.MountOptions); err != nil {
		return err
	}
	if err := spec.mount(mergedName, MountLegacy, *f); err != nil {
		switch {
		case exhausted(err):
			return err // a full disk: another time it can
		case errors.Is(err, unix.EINVAL) && len(opts.MountOptions) > 0:
			spec.options = f.mountOptions()
			if spec.mount(mergedName, MountLegacy, *f) == nil {
				return unsupported("the kernel refuses mount options %q: %w", opts.MountOptions, err)
			}
			return fmt.Errorf("%w: %w", ErrIncompatibleFS, err)
		case errors.Is(err, unix.ENODEV):
			return unsupported("the kernel has no overlay filesystem: %w", err)
		case errors.Is(err, unix.EPERM):
			return unsupported("mounting is not permitted: %w", err)
		default:
			return fmt.Errorf("%w: %w", ErrIncompatibleFS, err)
		}
	}
	if err := f.probeMounted(tmp); err != nil {
		return err
	}
	if err := sys.Unmount(filepath.Join(tmp, mergedName)); err != nil {
		return err
	}
	spec.upper, spec.work = "", "" // a second mount of them would meet what volatile left
	f.probeNewAPI(spec)
	if opts.MountMethod == MountFiles {
		fd, err := spec.detachedFiles(0)
		if err == nil {
			err = sys.Close(fd)
		}
		f.files, f.filesErr = mountAnswer(err), err
	}
	if f.newAPI != yes || opts.MountMethod == MountDescriptors {
		return f.probeDescriptors(spec)
	}
	return nil
}

// mountAnswer tells a kernel that cannot from a machine that has no descriptors or memory left.
func mountAnswer(err error) answer {
	switch {
	case err == nil:
		return yes
	case sys.CannotMount(err) || errors.Is(err, fs.ErrNotExist):
		return no
	}
	return unknown
}

// probeNewAPI makes a read-only mount that it does not attach.
func (f *facts) probeNewAPI(spec mountSpec) {
	fd, err := spec.detached(0)
	if err == nil {
		err = sys.Close(fd)
	}
	f.newAPI, f.newAPIErr = mountAnswer(err), err
}

// probeDescriptors mounts the layers as open directories.
func (f *facts) probeDescriptors(spec mountSpec) error {
	f.descriptorsErr = spec.mountDescriptors(mergedName)
	f.descriptors = mountAnswer(f.descriptorsErr)
	if f.descriptors != yes {
		return nil
	}
	return sys.Unmount(filepath.Join(spec.home, mergedName))
}

// checkUserOptions refuses what the kernel does without trusted xattrs (ovl_fs_params_verify of
// fs/overlayfs/params.c), to say why.
func (f *facts) checkUserOptions(options []string) error {
	if !f.userxattr {
		return nil
	}
	for _, o := range options {
		if o == "metacopy=on" || o == "redirect_dir=on" {
			return fmt.Errorf("%w: mount option %q cannot be used in a user namespace", ErrInvalidOption, o)
		}
	}
	return nil
}

// probeDType looks for the types of the directories that lie in tmp, and at how times change there.
func (f *facts) probeDType(tmp string) error {
	fd, err := sys.OpenRoot(tmp)
	if err != nil {
		return err
	}
	known, err := sys.HasDType(fd)
	if err == nil {
		f.fineTimes, err = sys.HasFineTimes(fd, "times")
	}
	if err := errors.Join(err, sys.Close(fd)); err != nil {
		return err
	}
	f.dType = answerOf(known)
	if known {
		return nil
	}
	switch f.backingFS {
	case "xfs":
		return unsupported("xfs without d_type: make it with mkfs.xfs -n ftype=1")
	case "extfs":
		return unsupported("ext4 without d_type: enable it with tune2fs -O filetype")
	}
	return unsupported("the filesystem does not support d_type")
}

// probeMounted works in the mount and looks at upper.
func (f *facts) probeMounted(tmp string) error {
	merged, upper := filepath.Join(tmp, mergedName), filepath.Join(tmp, "up/diff")
	prefix := "trusted.overlay."
	if f.userxattr {
		prefix = "user.overlay."
	}
	// The directory d is opaque in its own layer; its copy in upper must not become so.
	if err := os.WriteFile(filepath.Join(merged, "d/f"), nil, 0o600); err != nil {
		return err
	}
	opaque, err := hasXattr(filepath.Join(upper, "d"), prefix+"opaque")
	if err != nil {
		return err
	}
	f.opaqueRight = answerOf(!opaque)

	switch err := os.Rename(filepath.Join(merged, "d/sub"), filepath.Join(merged, "d/moved")); {
	case err == nil:
		f.redirectDir = yes
	case errors.Is(err, unix.EXDEV):
		f.redirectDir = no
	default:
		return err
	}

	if err := os.Chmod(filepath.Join(merged, "file"), 0o640); err != nil {
		return err
	}
	metacopy, err := hasXattr(filepath.Join(upper, "file"), prefix+"metacopy")
	f.metacopy = answerOf(metacopy)
	return err
}

// hasXattr reports whether the file has the attribute.
func hasXattr(path, name string) (bool, error) {
	switch _, err := unix.Lgetxattr(path, name, nil); err {
	case nil:
		return true, nil
	case unix.ENODATA:
		return false, nil
	default:
		return false, &os.PathError{Op: "getxattr " + name, Path: path, Err: err}
	}
}

// hasOption reports whether options set key.
func hasOption(options []string, key string) bool {
	for _, o := range options {
		if name, _, _ := strings.Cut(o, "="); name == key {
			return true
		}
	}
	return false
}
