package overlay2

import (
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/bcc2decd/overlay2/archive"
	units "github.com/docker/go-units"
	"github.com/sirupsen/logrus"
)

// MountMethod is the way a layer is mounted.
type MountMethod uint8

const (
	// MountAuto takes the quickest way that can mount the layer at hand: mount(2) with absolute names where they
	// fit into a page (some 75 layers), so that /proc/self/mountinfo shows them; beyond that mount(2) with directories
	// that the Driver holds open, shown as /proc/self/fd/N (about 200 fit) or as N. Where these are not held, as at the
	// first Get of a chain: mount(2) with names relative to the home while those fit, then MountNewAPI or, on a kernel
	// without it, MountDescriptors.
	MountAuto MountMethod = iota
	// MountLegacy takes mount(2) with names: 128 layers with pages of 4 KiB, as Docker.
	MountLegacy
	// MountNewAPI takes fsopen(2) and gives the kernel one layer after the other: 500 layers,
	// names of any length, errors in the kernel's own words (Linux 6.7, commit 24e16e385f22).
	MountNewAPI
	// MountDescriptors takes mount(2) with the numbers of open directories: 500 layers on
	// kernels before 6.7. It needs /proc and a descriptor for each layer, and /proc/self/mountinfo shows
	// numbers in place of names.
	MountDescriptors
	// MountFiles takes fsopen(2) and gives the kernel open directories (Linux 6.13, commit
	// a08557d19ef4): 500 layers, no name is resolved twice. It needs a descriptor for each layer, and /proc/self/mountinfo
	// shows absolute paths: on a line of more than 64 KiB, which 500 layers in a home of 120 characters have, programs fail
	// that read it by a bufio.Scanner (dockerd 20.10 does not start then). Nothing takes it by itself.
	MountFiles
)

// String returns the method's name, as Status shows it.
func (m MountMethod) String() string {
	switch m {
	case MountAuto:
		return "auto"
	case MountLegacy:
		return "legacy"
	case MountNewAPI:
		return "new API"
	case MountDescriptors:
		return "descriptors"
	case MountFiles:
		return "files"
	}
	return fmt.Sprintf("MountMethod(%d)", uint8(m))
}

// Options say how a Driver works. The zero value is a good default.
type Options struct {
	// Size is the default limit of a read-write layer in bytes, 0 for none. Where there are no project quotas New is
	// ErrNotSupported with it.
	Size uint64
	// Inodes is the default limit of a read-write layer's files, 0 for none. It needs project quotas, as Size.
	Inodes uint64
	// IDMap translates the owners in diffs to owners on disk.
	IDMap archive.IDMap
	// MountOptions are passed to every overlay mount: "metacopy=on", "redirect_dir=on",
	// "xino=auto", "volatile" and the like. Options that the driver sets itself are refused.
	// With volatile nothing is synced when a layer is unmounted; see ErrUnsynced.
	MountOptions []string
	// MountMethod forces a way of mounting. One that the kernel doesn't have is ErrNotSupported.
	MountMethod MountMethod
	// Durability says what is safe when power is cut.
	Durability Durability
	// SparseDiffs lets Diff leave out the holes of sparse files (PAX, GNU.sparse 1.0), which ApplyDiff and GNU
	// tar make again. Without it they are zeros in the tar, as images need: see archive.PackOptions.NoSparse.
	SparseDiffs bool
	// RecordDigests makes ApplyDiff and ApplyLayers record a digest of each file, for Verify. That reads
	// each layer once more, which docs/repair.md has figures of. A layer whose sparse files have more than 64 GiB of
	// holes is left without, which is logged: the method RecordDigests can do it.
	RecordDigests bool
	// OverrideKernelCheck lets New work on a kernel that is older than it asks for.
	OverrideKernelCheck bool
	// Log takes what cannot be returned, such as an error of a deletion in the
	// background. Nil is logrus's standard logger.
	Log *logrus.Entry
}

// CreateOpts are the options of one layer.
type CreateOpts struct {
	// MountLabel is the layer's SELinux label. It is used by Get, which is given it again.
	MountLabel string
	// StorageOpt limits a read-write layer: "size" in bytes or with a unit
	// ("10G", powers of 1024), "inodes" as a number; "none" is no limit whatever the Driver's default is.
	// Keys may have any case.
	StorageOpt map[string]string
}

// LayerDiff is a layer that ApplyLayers is to make, and its tar.
type LayerDiff struct {
	// ID is the new layer's.
	ID string
	// Diff is a tar, not compressed. It is read to its end unless something fails.
	Diff io.Reader
}

// Usage is what a layer takes on disk.
type Usage struct {
	// Bytes is the space of its blocks.
	Bytes uint64
	// Inodes is the number of its files, directories included.
	Inodes uint64
	// MaxBytes and MaxInodes are its limits, 0 for none.
	MaxBytes  uint64
	MaxInodes uint64
}

// ParseOptions reads options in a daemon's form, "overlay2.size=10G". Keys may have any
// case and blanks around them:
//
//	overlay2.size=SIZE                  Options.Size, with a unit of 1024; none for no limit
//	overlay2.inodes=N                   Options.Inodes; none for no limit
//	overlay2.override_kernel_check=BOOL Options.OverrideKernelCheck
//	overlay2.durability=MODE            Options.Durability: background, strict or off
//	overlay2.mountopt=OPT[,OPT...]      Options.MountOptions
//	overlay2.record_digests=BOOL        Options.RecordDigests
//
// An unknown key or a bad value is ErrInvalidOption and is named.
func ParseOptions(options []string) (Options, error) {
	var o Options
	for _, option := range options {
		key, value, ok := strings.Cut(option, "=")
		if !ok {
			return Options{}, fmt.Errorf("%w: unable to parse %q: not KEY=VALUE", ErrInvalidOption, option)
		}
		key, value = strings.ToLower(strings.TrimSpace(key)), strings.TrimSpace(value)
		var err error
		switch key {
		case "overlay2.size":
			o.Size, err = parseLimit(value, parseSize)
		case "overlay2.inodes":
			o.Inodes, err = parseLimit(value, parseCount)
		case "overlay2.override_kernel_check":
			o.OverrideKernelCheck, err = strconv.ParseBool(value)
		case "overlay2.record_digests":
			o.RecordDigests, err = strconv.ParseBool(value)
		case "overlay2.durability":
			o.Durability, err = parseDurability(value)
		case "overlay2.mountopt":
			o.MountOptions = strings.Split(value, ",")
			err = checkMountOptions(o.MountOptions)
		default:
			return Options{}, fmt.Errorf("%w: unknown key %q", ErrInvalidOption, key)
		}
		if err != nil {
			return Options{}, fmt.Errorf("%w: %s: %w", ErrInvalidOption, key, err)
		}
	}
	return o, nil
}

// limits are what a layer may hold; 0 is no limit.
type limits struct{ size, inodes uint64 }

// noLimit is the value of a storage option that says that there is none.
const noLimit = "none"

// parseStorageOpt reads the options of one layer on top of the defaults. A given
// value that is 0 or not a number is an error, never taken for "no limit".
func parseStorageOpt(opts *CreateOpts, defaults limits) (limits, error) {
	l := defaults
	if opts == nil {
		return l, nil
	}
	seen := make(map[string]bool)
	for key, value := range opts.StorageOpt {
		key, value = strings.ToLower(key), strings.TrimSpace(value)
		var err error
		switch {
		case key != "size" && key != "inodes":
			return limits{}, fmt.Errorf("%w: unknown storage option %q", ErrInvalidOption, key)
		case seen[key]:
			err = errors.New("given twice")
		case key == "size":
			l.size, err = parseLimit(value, parseSize)
		default:
			l.inodes, err = parseLimit(value, parseCount)
		}
		if err != nil {
			return limits{}, fmt.Errorf("%w: storage option %s: %w", ErrInvalidOption, key, err)
		}
		seen[key] = true
	}
	return l, nil
}

// parseLimit reads the limit of a layer.
func parseLimit(value string, parse func(string) (uint64, error)) (uint64, error) {
	if value == noLimit {
		return 0, nil
	}
	n, err := parse(value)
	if err == nil && n == 0 {
		err = fmt.Errorf("%q: must be more than 0; %q is no limit", value, noLimit)
	}
	return n, err
}

func parseCount(s string) (uint64, error) { return strconv.ParseUint(s, 10, 64) }

// checkResize refuses options that Resize cannot have.
func checkResize(storageOpt map[string]string) error {
	if len(storageOpt) == 0 {
		return fmt.Errorf("%w: neither size nor inodes is given", ErrInvalidOption)
	}
	_, err := parseStorageOpt(&CreateOpts{StorageOpt: storageOpt}, limits{})
	return err
}

// parseSize reads a size with an optional unit of 1024.
func parseSize(s string) (uint64, error) {
	n, err := units.RAMInBytes(strings.TrimSpace(s))
	if err != nil {
		return 0, err
	}
	if n < 0 {
		return 0, fmt.Errorf("%q: negative size", s)
	}
	return uint64(n), nil
}

// mountOptionValues lists the overlay options that callers may set, with the values that
// the kernel takes (Documentation/filesystems/overlayfs.rst); nil is an option without a value.
var mountOptionValues = map[string][]string{
	"index":        {"on", "off"},
	"metacopy":     {"on", "off"},
	"nfs_export":   {"on", "off"},
	"redirect_dir": {"on", "off", "follow", "nofollow"},
	"uuid":         {"on", "off", "null", "auto"},
	"verity":       {"on", "off", "require"},
	"volatile":     nil,
	"xino":         {"on", "off", "auto"},
}

// checkMountOptions refuses what is not an overlay option with one of its values: a
// list that let anything through could replace the layers themselves.
func checkMountOptions(options []string) error {
	for _, option := range options {
		key, value, hasValue := strings.Cut(option, "=")
		values, known := mountOptionValues[key]
		if !known {
			return fmt.Errorf("%w: mount option %q", ErrInvalidOption, option)
		}
		if !hasValue && values == nil {
			continue
		}
		ok := false
		for _, v := range values {
			ok = ok || (hasValue && v == value)
		}
		if !ok {
			return fmt.Errorf("%w: mount option %q", ErrInvalidOption, option)
		}
	}
	return nil
}

// checkMountLabel refuses a SELinux label with a character that could end the quotes
// around it. A context is user:role:type:level, the level with commas (SELinux Notebook, "Security Context").
func checkMountLabel(label string) error {
	for i := 0; i < len(label); i++ {
		if c := label[i]; c <= ' ' || c >= 0x7f || c == '"' || c == '\'' || c == '\\' || c == '=' {
			return fmt.Errorf("%w: mount label %q: character %q", ErrInvalidOption, label, c)
		}
	}
	return nil
}
