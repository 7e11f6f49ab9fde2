//go:build linux

package main

import "time"

// guest is one machine to test on.
type guest struct {
	name string
	// all says that it is left out of the quick set.
	all bool
	// uml runs the kernel as a process of the host; otherwise QEMU emulates the machine.
	uml bool
	// arch is Go's name of the processor.
	arch string
	// kernel is the Debian package of the kernel, a pattern for what comes closest.
	kernel string
	// append is what the kernel's command line has beside the usual.
	append string
	// quick are the packages that the quick set tests, if not all: emulation is slow.
	quick []string
	// skip are tests that are left out unless some were asked for, as of -test.skip: those that take long there
	// and see nothing that the host or a quicker guest does not.
	skip string
	// disks are names of diskKinds.
	disks []string
	// require is what tests may not miss: OVERLAY2_TEST_REQUIRE.
	require string
	// selinux says that a policy is loaded.
	selinux bool
	// testFS limits tests that go over filesystems, OVERLAY2_TEST_FS; "" for no limit.
	testFS string
	// pageSize is what the kernel must have, 0 if it doesn't matter.
	pageSize int
	// timeout bounds the whole; a guest that hangs is found by its silence.
	timeout time.Duration
}

const (
	needsBasic = "linux,root,proc,overlay,loop,mknod,userns,tmpfs"
	needsAll   = needsBasic + ",ext4,xfs,btrfs,quota,quota-ext4,cmd:mkfs.ext4,cmd:mkfs.xfs,cmd:mkfs.btrfs,cmd:sh,cmd:stat"
)

// emulatedSkip is what guests without acceleration leave out.
const emulatedSkip = "Faults|PowerCut|Kill|Scale"

// noTmpfs is for kernels before 6.6: their tmpfs has no user.* xattrs.
const noTmpfs = "ext4,xfs,btrfs"

// guests returns the machines. The kernels are those of the Debian that the host runs.
func guests() []guest {
	disks := []string{"ext4", "xfs", "btrfs"}
	return []guest{
		{
			name: "uml-6.1", uml: true, arch: "amd64", disks: disks,
			skip: "Faults|KillSteps|KillChildren|Scale", require: needsAll, testFS: noTmpfs, timeout: 60 * time.Minute,
		},
		{
			name: "qemu-6.12", arch: "amd64", kernel: "linux-image-6.12-cloud-amd64", disks: disks,
			quick: []string{".", "quota", "internal/sys"}, skip: "Faults|PowerCut|Kill|DeepChain|ManyQuotas", require: needsAll, timeout: 60 * time.Minute,
		},
		{
			name: "qemu-6.1", all: true, arch: "amd64", kernel: "linux-image-cloud-amd64", disks: disks,
			skip: emulatedSkip, require: needsAll, testFS: noTmpfs, timeout: 120 * time.Minute,
		},
		{
			name: "selinux-6.12", all: true, arch: "amd64", kernel: "linux-image-6.12-cloud-amd64", disks: disks,
			append: "security=selinux selinux=1 enforcing=0", selinux: true,
			skip: emulatedSkip, require: needsAll + ",selinux", timeout: 120 * time.Minute,
		},
		{
			// mkfs would need the host's programs, which are for another processor.
			name: "ppc64le-64k", all: true, arch: "ppc64le", kernel: "linux-image-powerpc64le", disks: disks[:2], pageSize: 64 << 10,
			skip: emulatedSkip, require: needsBasic + ",ext4,xfs,quota,quota-ext4", testFS: "ext4,xfs", timeout: 120 * time.Minute,
		},
		{
			name: "arm64-16k", all: true, arch: "arm64", kernel: "linux-image-6.12-arm64-16k", disks: disks[:2], pageSize: 16 << 10,
			skip: emulatedSkip, require: needsBasic + ",ext4,xfs,quota,quota-ext4", testFS: "ext4,tmpfs,xfs", timeout: 120 * time.Minute,
		},
	}
}

// diskKind is how a filesystem is made and mounted.
type diskKind struct {
	fsType  string
	mkfs    []string
	options string
}

// diskKinds returns the filesystems by name.
func diskKinds() map[string]diskKind {
	return map[string]diskKind{
		// With inodes for a test of 132,000 names.
		"ext4":  {"ext4", []string{"mkfs.ext4", "-q", "-F", "-i", "8192", "-O", "quota,project", "-E", "lazy_itable_init=1,lazy_journal_init=1"}, "prjquota"},
		"xfs":   {"xfs", []string{"mkfs.xfs", "-q", "-f"}, "prjquota"},
		"btrfs": {"btrfs", []string{"mkfs.btrfs", "-q", "-f"}, ""},
	}
}

// diskSize is that of each disk; the images are sparse.
const diskSize = 2 << 30

// moduleNames are the kernel modules that tests need; the ones that a kernel has built in are passed over.
func moduleNames() []string {
	return []string{
		"crc32c_generic", "xxhash_generic", "blake2b_generic", "sha256_generic", "libcrc32c",
		"virtio_pci", "virtio_blk", "virtio_rng", "quota_v2", "ext4", "xfs", "btrfs", "overlay", "loop", "erofs", "squashfs",
	}
}

// guestTools are programs of the host that QEMU guests of its own kind get to see.
func guestTools() []string {
	return []string{"mkfs.ext4", "mkfs.xfs", "mkfs.btrfs", "tar", "unshare", "cat", "sh", "stat", "rm", "mkdir", "chown", "chmod", "ln"}
}
