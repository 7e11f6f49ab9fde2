package quota

import (
	"maps"
	"runtime"
	"slices"
	"strings"
	"testing"
	"unsafe"
)

// TestLayout spells out the offsets that the compiler's asserts leave out. Sources:
// include/uapi/linux/fs.h and dqblk_xfs.h.
func TestLayout(t *testing.T) {
	for name, at := range map[string][2]uintptr{
		"fsxattr.xflags":            {unsafe.Offsetof(fsxattr{}.xflags), 0},
		"fsxattr.cowextsize":        {unsafe.Offsetof(fsxattr{}.cowextsize), 16},
		"diskQuota.fieldmask":       {unsafe.Offsetof(diskQuota{}.fieldmask), 2},
		"diskQuota.id":              {unsafe.Offsetof(diskQuota{}.id), 4},
		"diskQuota.blkSoft":         {unsafe.Offsetof(diskQuota{}.blkSoft), 16},
		"diskQuota.inoHard":         {unsafe.Offsetof(diskQuota{}.inoHard), 24},
		"diskQuota.inoSoft":         {unsafe.Offsetof(diskQuota{}.inoSoft), 32},
		"diskQuota.blkCount":        {unsafe.Offsetof(diskQuota{}.blkCount), 40},
		"diskQuota.inoTimer":        {unsafe.Offsetof(diskQuota{}.inoTimer), 56},
		"diskQuota.inoWarns":        {unsafe.Offsetof(diskQuota{}.inoWarns), 64},
		"diskQuota.rtBlkTimer":      {unsafe.Offsetof(diskQuota{}.rtBlkTimer), 96},
		"quotaState.user":           {unsafe.Offsetof(quotaState{}.user), 8},
		"quotaState.group":          {unsafe.Offsetof(quotaState{}.group), 32},
		"quotaState.project":        {unsafe.Offsetof(quotaState{}.project), 56},
		"quotaState.blkWarnLimit":   {unsafe.Offsetof(quotaState{}.blkWarnLimit), 92},
		"quotaState.pad2":           {unsafe.Offsetof(quotaState{}.pad2), 104},
		"the size of quotaFileStat": {unsafe.Sizeof(quotaFileStat{}), 24},
	} {
		if at[0] != at[1] {
			t.Errorf("%s is %d, want %d", name, at[0], at[1])
		}
	}
}

// TestIoctlNumbers computes the numbers anew, as the kernel's macros do.
func TestIoctlNumbers(t *testing.T) {
	// Direction bits start at 30, or at 29 on the three families that have 13 bits of size.
	read, write, shift := uint32(2), uint32(1), 30
	for _, family := range []string{"mips", "ppc", "sparc"} {
		if strings.HasPrefix(runtime.GOARCH, family) {
			read, write, shift = 2, 4, 29
		}
	}
	number := func(dir, nr uint32) uint32 {
		return dir<<shift | uint32(unsafe.Sizeof(fsxattr{}))<<16 | 'X'<<8 | nr
	}
	if got, want := uint32(ioctlGetXattr), number(read, 31); got != want {
		t.Errorf("FS_IOC_FSGETXATTR is %#x, want %#x", got, want)
	}
	if got, want := uint32(ioctlSetXattr), number(write, 32); got != want {
		t.Errorf("FS_IOC_FSSETXATTR is %#x, want %#x", got, want)
	}
}

func TestBlocksRoundUp(t *testing.T) {
	for n, want := range map[uint64]uint64{0: 0, 1: 1, 511: 1, 512: 1, 513: 2, 1 << 40: 1 << 31, 1<<64 - 1: 1 << 55} {
		if got := blocks(n); got != want {
			t.Errorf("blocks(%d) = %d, want %d", n, got, want)
		}
	}
}

func TestParseReserved(t *testing.T) {
	for _, c := range []struct {
		text  string
		field int
		want  []uint32
	}{
		{"a:5\nb:7 # seven\n\n# c:8\n", 1, []uint32{5, 7}},
		{"10:/srv/a\n11:/srv/b:c\n", 0, []uint32{10, 11}},
		{"noise\n:\nx:y\nz:-1\nbig:4294967296\n 3 :/x", 0, []uint32{3}},
		{"last:4294967295", 1, []uint32{4294967295}},
		{"", 0, nil},
	} {
		ids := map[uint32]bool{}
		parseReserved(ids, c.text, c.field)
		if got := slices.Sorted(maps.Keys(ids)); !slices.Equal(got, c.want) {
			t.Errorf("%q field %d: %v, want %v", c.text, c.field, got, c.want)
		}
	}
}
