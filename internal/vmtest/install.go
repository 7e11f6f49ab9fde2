//go:build linux

package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// install gets by apt-get what is missing for the guests: the emulators, user-mode Linux
// and the programs that make filesystems.
func install(guests []guest) error {
	need := map[string]string{
		"mkfs.ext4": "e2fsprogs", "mkfs.xfs": "xfsprogs", "mkfs.btrfs": "btrfs-progs", "xz": "xz-utils",
	}
	for _, g := range guests {
		switch {
		case g.uml:
			need[umlProgram] = "user-mode-linux"
		case g.arch == "ppc64le":
			need[qemu(g.arch)] = "qemu-system-ppc"
		case g.arch == "arm64":
			need[qemu(g.arch)] = "qemu-system-arm"
		default:
			need[qemu(g.arch)] = "qemu-system-x86"
		}
		if g.selinux {
			need["secilc"] = "secilc"
		}
	}
	var packages []string
	for program, pkg := range need {
		if _, err := exec.LookPath(program); err != nil {
			packages = append(packages, pkg)
		}
	}
	if len(packages) == 0 {
		return nil
	}
	fmt.Println("installing", strings.Join(packages, " "))
	if err := aptGet("", "update"); err != nil {
		fmt.Println("apt-get update:", err) // the lists there are may do
	}
	return aptGet("", append([]string{"install", "-y", "-qq", "--no-install-recommends"}, packages...)...)
}

// aptGet runs apt-get in dir, and shows its output if it fails.
func aptGet(dir string, args ...string) error {
	args = append([]string{"-o", "DPkg::Lock::Timeout=300", "-o", "APT::Sandbox::User=root"}, args...)
	cmd := exec.Command("apt-get", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("apt-get %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}

// kernelOf returns the directory with the guest's unpacked kernel package; the first
// time it is downloaded into the cache.
func kernelOf(g guest, cache string) (string, error) {
	dir := filepath.Join(cache, g.kernel)
	if image, err := kernelImage(dir); err == nil && image != "" {
		return dir, nil
	}
	fmt.Println("downloading", g.kernel)
	tmp, err := os.MkdirTemp(cache, "download-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	apt, err := aptFor(g.arch, tmp)
	if err != nil {
		return "", err
	}
	pkg, err := realPackage(g.kernel, apt)
	if err != nil {
		return "", err
	}
	if err := aptGet(tmp, append(apt, "download", pkg)...); err != nil {
		return "", err
	}
	debs, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil || len(debs) != 1 {
		return "", fmt.Errorf("download of %s gave %d packages: %w", pkg, len(debs), err)
	}
	unpacked := filepath.Join(tmp, "unpacked")
	if out, err := exec.Command("dpkg", "-x", debs[0], unpacked).CombinedOutput(); err != nil {
		return "", fmt.Errorf("dpkg -x %s: %w: %s", debs[0], err, out)
	}
	return dir, errors.Join(os.RemoveAll(dir), os.Rename(unpacked, dir))
}

// kernelImage returns the path of the kernel in an unpacked package.
func kernelImage(dir string) (string, error) {
	images, err := filepath.Glob(filepath.Join(dir, "boot", "vmlinu[xz]-*"))
	if err != nil || len(images) == 0 {
		return "", fmt.Errorf("no kernel in %s: %w", dir, errors.Join(err, os.ErrNotExist))
	}
	return images[0], nil
}

// aptFor returns options that make apt-get see the packages of an architecture. For a
// foreign one it gets lists of its own below dir: telling dpkg about the architecture
// would change the host.
func aptFor(arch, dir string) ([]string, error) {
	if arch == "amd64" {
		return nil, nil
	}
	debian := map[string]string{"ppc64le": "ppc64el", "arm64": "arm64"}[arch]
	release, err := osRelease("VERSION_CODENAME")
	if err != nil {
		return nil, err
	}
	for _, d := range []string{"lists/partial", "archives/partial"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return nil, err
		}
	}
	list := filepath.Join(dir, "sources.list")
	mirror, err := debianMirror()
	if err != nil {
		return nil, err
	}
	// Newer kernels than the release's own come with its security updates.
	const key = "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] "
	line := key + mirror + " " + release + " main\n" + key + mirror + "-security " + release + "-security main\n"
	if err := os.WriteFile(list, []byte(line), 0o644); err != nil {
		return nil, err
	}
	apt := []string{
		"-o", "APT::Architecture=" + debian, "-o", "APT::Architectures=" + debian,
		"-o", "Dir::State::Lists=" + filepath.Join(dir, "lists"), "-o", "Dir::Cache=" + dir,
		"-o", "Dir::Etc::SourceList=" + list, "-o", "Dir::Etc::SourceParts=/dev/null", "-o", "Dir::State::Status=/dev/null",
	}
	return apt, aptGet(dir, append(apt, "update")...)
}

// realPackage follows a package that only depends on the kernel of the day.
func realPackage(name string, apt []string) (string, error) {
	out, err := exec.Command("apt-cache", append(apt, "show", "--no-all-versions", name)...).Output()
	if err != nil {
		return "", fmt.Errorf("apt-cache show %s: %w", name, err)
	}
	for line := range strings.Lines(string(out)) {
		list, ok := strings.CutPrefix(line, "Depends:")
		if !ok {
			continue
		}
		for dep := range strings.SplitSeq(list, ",") {
			if dep, _, _ = strings.Cut(strings.TrimSpace(dep), " "); strings.HasPrefix(dep, "linux-image-") {
				return dep, nil
			}
		}
	}
	return name, nil
}

// osRelease returns a field of /etc/os-release.
func osRelease(field string) (string, error) {
	text, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(text)) {
		if v, ok := strings.CutPrefix(line, field+"="); ok {
			return strings.Trim(strings.TrimSpace(v), `"`), nil
		}
	}
	return "", fmt.Errorf("/etc/os-release has no %s: %w", field, os.ErrNotExist)
}

// debianMirror returns the address from which the host takes Debian's packages: the first
// in its lists of sources.
func debianMirror() (string, error) {
	for _, path := range []string{"/etc/apt/sources.list.d/debian.sources", "/etc/apt/sources.list"} {
		text, err := os.ReadFile(path)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return "", err
		}
		for line := range strings.Lines(string(text)) {
			if strings.HasPrefix(line, "#") {
				continue
			}
			for _, word := range strings.Fields(line) {
				if strings.HasPrefix(word, "http://") || strings.HasPrefix(word, "https://") {
					return strings.TrimRight(word, "/"), nil
				}
			}
		}
	}
	return "", fmt.Errorf("no sources of Debian packages in /etc/apt: %w", os.ErrNotExist)
}
