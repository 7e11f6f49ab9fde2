//go:build linux

package main

import (
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

//go:embed selinux.cil
var policySource string

// initialSIDs are the kernel's initial contexts in the order of their numbers
// (security/selinux/include/initial_sid_to_string.h).
func initialSIDs() []string {
	return strings.Fields(`kernel security unlabeled fs file file_labels init any_socket port netif netmsg node
		igmp_packet icmp_socket tcp_socket sysctl_modprobe sysctl sysctl_fs sysctl_kernel sysctl_net
		sysctl_net_unix sysctl_vm sysctl_dev kmod policy scmp_packet devnull`)
}

// addPolicy compiles the policy and puts it into the initramfs; it returns its path there.
func (m *machine) addPolicy(rd *initrd) (string, error) {
	var cats, sids strings.Builder
	var names []string
	for i := range 1024 {
		names = append(names, fmt.Sprintf("c%d", i))
		fmt.Fprintf(&cats, "(category c%d)\n", i)
	}
	fmt.Fprintf(&cats, "(categoryorder (%s))\n(sensitivitycategory s0 (range c0 c1023))\n", strings.Join(names, " "))
	for _, sid := range initialSIDs() {
		context := "object"
		if slices.Contains([]string{"kernel", "init", "kmod"}, sid) {
			context = "process"
		}
		fmt.Fprintf(&sids, "(sid %s)\n(sidcontext %s %s)\n", sid, sid, context)
	}
	fmt.Fprintf(&sids, "(sidorder (%s))\n", strings.Join(initialSIDs(), " "))
	text := strings.NewReplacer("; CATEGORIES", cats.String()+"; Categories", "; SIDS", sids.String()+"; Initial contexts").Replace(policySource)
	source, policy := filepath.Join(m.dir, "policy.cil"), filepath.Join(m.dir, "policy")
	if err := os.WriteFile(source, []byte(text), 0o644); err != nil {
		return "", err
	}
	// Version 31 is one that every kernel from 4.13 on takes.
	if out, err := exec.Command("secilc", "-c", "31", "-o", policy, "-f", "/dev/null", source).CombinedOutput(); err != nil {
		return "", fmt.Errorf("secilc: %w: %s", err, out)
	}
	return "/policy", rd.copy("/policy", policy)
}
