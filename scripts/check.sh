#!/bin/bash
# Checks what neither compiler nor linter sees: formatting, tidy go.mod files, the modules
# that the library links, and the size of files.
set -euo pipefail
cd "$(dirname "$0")/.."
go=${GO:-go}
status=0
bad() {
	echo "$@" >&2
	status=1
}

mapfile -t files < <(git ls-files '*.go')
unformatted=$(gofmt -l "${files[@]}")
[ -z "$unformatted" ] || bad "not formatted by gofmt:" "$unformatted"

while read -r mod; do
	# What pins the linters has hundreds of modules that only its own tests need.
	[ "$mod" = tools/go.mod ] && continue
	(cd "$(dirname "$mod")" && "$go" mod tidy -diff) || bad "$mod is not tidy: run go mod tidy there"
done < <(git ls-files '*go.mod')

# The five modules of the library, and below them what they link themselves.
allowed='github.com/bcc2decd/overlay2
github.com/docker/go-units
github.com/moby/sys/mount
github.com/moby/sys/mountinfo
github.com/opencontainers/selinux
github.com/sirupsen/logrus
golang.org/x/sys
cyphar.com/go-pathrs
github.com/cyphar/filepath-securejoin'
linked=$("$go" list -deps -f '{{with .Module}}{{.Path}}{{end}}' ./... | sort -u | sed '/^$/d')
extra=$(comm -23 <(echo "$linked") <(sort -u <<<"$allowed"))
[ -z "$extra" ] || bad "the library links modules that it must not:" "$extra"
direct=$("$go" list -m -f '{{if not (or .Indirect .Main)}}{{.Path}}{{end}}' all | sed '/^$/d')
extra=$(comm -23 <(sort <<<"$direct") <(printf '%s\n' "$allowed" github.com/google/go-cmp | sort -u))
[ -z "$extra" ] || bad "go.mod requires modules that the library must not use:" "$extra"
# netgo and the like would hide it: plainly, the library builds without a C compiler.
CGO_ENABLED=0 "$go" build ./... || bad "the library needs cgo"

mapfile -t shells < <(git ls-files '*.sh' .ci/run)
shellcheck -S warning "${shells[@]}" || bad "shellcheck is not content"

for f in "${files[@]}"; do
	case $f in
	*_test.go | benchmarks/*) continue ;;
	esac
	lines=$(wc -l <"$f")
	[ "$lines" -le 450 ] || bad "$f has $lines lines, more than 450: split it"
done
exit $status
