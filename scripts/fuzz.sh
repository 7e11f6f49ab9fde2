#!/bin/bash
# Runs every fuzz test of the library for the time given (20s): its stored corpus first,
# then new inputs. go test fuzzes one function of one package at a time.
set -euo pipefail
cd "$(dirname "$0")/.."
time=${1:-20s}
go=${GO:-go}

found=0
while read -r dir name; do
	found=1
	echo "== $dir $name"
	"$go" test -run='^$' -fuzz="^$name\$" -fuzztime="$time" -fuzzminimizetime=1x "$dir" </dev/null
done < <(grep -rhoE --include='*_test.go' --exclude-dir={cmd,graphdriver,snapshotter,benchmarks} -H '^func Fuzz[A-Za-z0-9_]+' . |
	sed -E 's|^(.*)/[^/]*:func (Fuzz.*)|\1 \2|' | sort)
[ $found = 1 ] || { echo "no fuzz tests found" >&2; exit 1; }
