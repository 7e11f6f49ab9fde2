// Package spec is what the host tells the guest and how the guest answers.
package spec

// Config tells the guest's init what to do; it is a JSON file in the guest.
type Config struct {
	// HostFS says that / is the host's root, read-only (user-mode Linux). Paths are then
	// below Host.
	HostFS bool
	// Modules are paths of kernel modules, each after those that it needs.
	Modules []string
	// Disks are mounted below /mnt by their names.
	Disks []Disk
	// Runs are the programs to run, one after the other.
	Runs []Run
	// Env is the environment of all programs.
	Env []string
	// Policy is the path of an SELinux policy to load, "" for none.
	Policy string
}

// Disk is a block device with a filesystem.
type Disk struct {
	Name, Device, Type, Options string
}

// Run is one program.
type Run struct {
	Name string
	Dir  string
	Argv []string
}

// Host is where a HostFS guest finds the host's root, as it hides /tmp and others below its own.
const Host = "/run/host"

// Lines that the guest's init writes among the output of programs.
const (
	// LineStart is followed by the kernel's release and the page size.
	LineStart = "VMTEST start "
	// LineRun is followed by the name of a run that begins.
	LineRun = "VMTEST run "
	// LineExit is followed by the name of a run, its exit code and its seconds.
	LineExit = "VMTEST exit "
	// LineError is followed by why the guest cannot go on.
	LineError = "VMTEST error "
	// LineEnd is the last one.
	LineEnd = "VMTEST end"
)
