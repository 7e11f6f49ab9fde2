package sys

import (
	"bufio"
	"errors"
	"io"
	"os"
	"strings"
)

// mountEscapes are the characters that mountinfo writes as octal numbers in paths (fs/proc_namespace.c, mangle).
var mountEscapes = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`, `\043`, "#")

// Propagates reports whether the mount that holds path, an absolute one without symlinks, is shared
// with other mounts. A line of mountinfo may have any length: overlays of many layers have long ones.
func Propagates(path string) (shared bool, err error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	r := bufio.NewReader(f)
	longest := 0
	for {
		line, err := r.ReadString('\n')
		if point, s, ok := parseMount(line); ok && len(point) >= longest && holds(point, path) {
			shared, longest = s, len(point) // the last one on the same place is on top
		}
		if err == io.EOF {
			return shared, nil
		}
		if err != nil {
			return false, err
		}
	}
}

// parseMount takes the mount point and its propagation from a line, see proc_pid_mountinfo(5):
// five fields and the options, then tags such as shared:N up to a single "-".
func parseMount(line string) (point string, shared, ok bool) {
	head, _, ok := strings.Cut(line, " - ")
	fields := strings.Split(head, " ")
	if !ok || len(fields) < 6 {
		return "", false, false
	}
	for _, tag := range fields[6:] {
		shared = shared || strings.HasPrefix(tag, "shared:")
	}
	return mountEscapes.Replace(fields[4]), shared, true
}

// holds reports whether path is dir or beneath it.
func holds(dir, path string) bool {
	rest, ok := strings.CutPrefix(path, strings.TrimSuffix(dir, "/"))
	return ok && (rest == "" || rest[0] == '/')
}
