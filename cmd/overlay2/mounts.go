//go:build linux

package main

import (
	"bufio"
	"errors"
	"io"
	"os"
	"strings"
)

// mountEscapes are what mountinfo writes for some characters of paths, see proc_pid_mountinfo(5).
var mountEscapes = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`, `\043`, "#")

// mountPoints returns all places where something is mounted. A line of the table may have any length: that of an overlay
// of many layers can be longer than the 64 KiB that a bufio.Scanner takes.
func mountPoints() (points map[string]bool, err error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	points = map[string]bool{}
	for r := bufio.NewReader(f); ; {
		line, err := r.ReadString('\n')
		if fields := strings.SplitN(line, " ", 6); len(fields) == 6 {
			points[mountEscapes.Replace(fields[4])] = true
		}
		if err == io.EOF {
			return points, nil
		}
		if err != nil {
			return nil, err
		}
	}
}
