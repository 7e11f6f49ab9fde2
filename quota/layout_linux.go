package quota

import "unsafe"

// fsxattr is struct fsxattr of linux/fs.h, the argument of FS_IOC_FS{GET,SET}XATTR.
type fsxattr struct {
	xflags     uint32
	extsize    uint32
	nextents   uint32
	projid     uint32
	cowextsize uint32
	pad        [8]byte
}

// xflagProjinherit is FS_XFLAG_PROJINHERIT: what is made in the directory gets its project.
const xflagProjinherit = 0x200

// diskQuota is struct fs_disk_quota of linux/dqblk_xfs.h. Space is in units of 512
// bytes on every filesystem.
type diskQuota struct {
	version      int8
	flags        int8
	fieldmask    uint16
	id           uint32
	blkHard      uint64
	blkSoft      uint64
	inoHard      uint64
	inoSoft      uint64
	blkCount     uint64
	inoCount     uint64
	inoTimer     int32
	blkTimer     int32
	inoWarns     uint16
	blkWarns     uint16
	inoTimerHi   int8
	blkTimerHi   int8
	rtBlkTimerHi int8
	padding2     int8
	rtBlkHard    uint64
	rtBlkSoft    uint64
	rtBlkCount   uint64
	rtBlkTimer   int32
	rtBlkWarns   uint16
	padding3     int16
	padding4     [8]byte
}

const (
	diskQuotaVersion = 1 // FS_DQUOT_VERSION
	flagProject      = 2 // FS_PROJ_QUOTA
	basicBlock       = 512

	fieldInoSoft = 1 << 0 // FS_DQ_ISOFT
	fieldInoHard = 1 << 1 // FS_DQ_IHARD
	fieldBlkSoft = 1 << 2 // FS_DQ_BSOFT
	fieldBlkHard = 1 << 3 // FS_DQ_BHARD
)

// quotaFileStat is struct fs_qfilestatv.
type quotaFileStat struct {
	ino      uint64
	blocks   uint64
	nextents uint32
	pad      uint32
}

// quotaState is struct fs_quota_statv.
type quotaState struct {
	version        int8
	pad1           uint8
	flags          uint16
	inCore         uint32
	user           quotaFileStat
	group          quotaFileStat
	project        quotaFileStat
	blkTimeLimit   int32
	inoTimeLimit   int32
	rtBlkTimeLimit int32
	blkWarnLimit   uint16
	inoWarnLimit   uint16
	rtBlkWarnLimit uint16
	pad3           uint16
	pad4           uint32
	pad2           [7]uint64
}

const (
	quotaStateVersion = 1      // FS_QSTATV_VERSION1
	projectAccounting = 1 << 4 // FS_QUOTA_PDQ_ACCT
	projectEnforced   = 1 << 5 // FS_QUOTA_PDQ_ENFD
)

// The commands of quotactl(2) for projects: command<<8 | PRJQUOTA.
const (
	cmdGet     = 0x5803<<8 | 2 // Q_XGETQUOTA
	cmdSet     = 0x5804<<8 | 2 // Q_XSETQLIM
	cmdState   = 0x5808<<8 | 2 // Q_XGETQSTATV
	cmdGetNext = 0x5809<<8 | 2 // Q_XGETNEXTQUOTA
)

// The kernel reads and writes these structures by offset: a layout that differs on
// some architecture must not compile there (the length of an array would be negative).
var (
	_ [28 - unsafe.Sizeof(fsxattr{})]byte
	_ [unsafe.Sizeof(fsxattr{}) - 28]byte
	_ [12 - unsafe.Offsetof(fsxattr{}.projid)]byte
	_ [unsafe.Offsetof(fsxattr{}.projid) - 12]byte

	_ [112 - unsafe.Sizeof(diskQuota{})]byte
	_ [unsafe.Sizeof(diskQuota{}) - 112]byte
	_ [8 - unsafe.Offsetof(diskQuota{}.blkHard)]byte
	_ [unsafe.Offsetof(diskQuota{}.blkHard) - 8]byte
	_ [48 - unsafe.Offsetof(diskQuota{}.inoCount)]byte
	_ [unsafe.Offsetof(diskQuota{}.inoCount) - 48]byte
	_ [72 - unsafe.Offsetof(diskQuota{}.rtBlkHard)]byte
	_ [unsafe.Offsetof(diskQuota{}.rtBlkHard) - 72]byte

	_ [160 - unsafe.Sizeof(quotaState{})]byte
	_ [unsafe.Sizeof(quotaState{}) - 160]byte
	_ [2 - unsafe.Offsetof(quotaState{}.flags)]byte
	_ [unsafe.Offsetof(quotaState{}.flags) - 2]byte
	_ [80 - unsafe.Offsetof(quotaState{}.blkTimeLimit)]byte
	_ [unsafe.Offsetof(quotaState{}.blkTimeLimit) - 80]byte
)
