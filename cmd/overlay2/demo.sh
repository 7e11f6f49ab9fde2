#!/bin/bash
# The whole life of an image: import, create a container layer, mount, change files from
# inside, show the changes, diff, commit, export, import again elsewhere, compare, remove.
#
#   demo.sh [IMAGE]     IMAGE is an OCI layout or archive, the output of docker save, or the tar
#                       of a root filesystem; without it, the busybox of testdata/image
#
# It needs root and Go, and leaves nothing behind. DEMO_DIR is where it works (default /var/tmp).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
shipped=$here/../../testdata/image/busybox.tar
image=$(realpath -- "${1:-$shipped}")

die() {
	echo "demo: $*" >&2
	exit 1
}

[ "$(uname -s)" = Linux ] || die "overlayfs is Linux's"
[ "$(id -u)" = 0 ] || die "mounting needs root: try sudo make demo"
[ -e "$image" ] || die "$image: no such file or directory"
go=${GO:-go}
command -v "$go" >/dev/null || die "Go is needed: https://go.dev/dl"

base=${DEMO_DIR:-/var/tmp}
# In a container /var/tmp lies on overlayfs, which cannot hold the layers of another one.
[ "$(stat -f -c %T "$base")" != overlayfs ] || base=/dev/shm
work=$(mktemp -d "$base/overlay2-demo.XXXXXX")
work=$(cd "$work" && pwd -P)
export OVERLAY2_ROOT=$work/root

# mounts lists what is mounted below the work directory, the last first.
mounts() {
	awk -v dir="$work/" 'index($5, dir) == 1 { print $5 }' /proc/self/mountinfo | tac
}

cleanup() {
	code=$?
	trap - EXIT INT TERM HUP
	for m in $(mounts); do
		umount -l "$m" || code=1
	done
	rm -rf --one-file-system "$work" || code=1
	if [ "$code" != 0 ]; then
		echo "demo: it did not go well; everything is cleaned up" >&2
	fi
	exit "$code"
}
trap cleanup EXIT
trap 'exit 130' INT TERM HUP

bold='' dim='' plain=''
if [ -t 1 ]; then
	bold=$'\e[1m' dim=$'\e[2m' plain=$'\e[0m'
fi
step=0
say() {
	step=$((step + 1))
	printf '\n%s%d. %s%s\n' "$bold" "$step" "$1" "$plain"
}
# run shows a command and does it.
run() {
	local shown="$*"
	shown=${shown//$work/DIR}
	printf '%s$ %s%s\n' "$dim" "${shown//$'\n'/ }" "$plain"
	"$@"
}
overlay2() { "$work/overlay2" "$@"; }

SECONDS=0
say "Build the tool (DIR is $work)"
run "$go" -C "$here" build -o "$work/overlay2" .

say "Import an image: its layers are verified and unpacked, each once"
run overlay2 import "$image" --name demo:base
run overlay2 tree

say "Create a layer to write in, on top of it, and mount all of them as one tree"
run overlay2 create box --from demo:base
run overlay2 mount box
box=$(overlay2 mount box) # a second time it only tells where
run ls -A "$box"

say "Run a program inside (chroot) that changes files"
busybox=/bin/busybox
if ! chroot "$box" "$busybox" true 2>/dev/null; then
	# The image has no busybox: lend it ours, as long as the program runs. By its name it knows what to do.
	OVERLAY2_ROOT=$work/tools overlay2 -q import "$shipped" >/dev/null
	OVERLAY2_ROOT=$work/tools overlay2 create tools --from overlay2/busybox:demo >/dev/null
	busybox=/busybox.demo
	cp "$(OVERLAY2_ROOT=$work/tools overlay2 mount tools)/bin/busybox" "$box$busybox"
	OVERLAY2_ROOT=$work/tools overlay2 umount tools
	chroot "$box" "$busybox" true 2>/dev/null || die "this machine cannot run the x86-64 busybox of testdata/image"
fi
# Files to work on: some that most images have, then whatever there is, programs last.
files=()
while IFS= read -r -d '' f; do
	case ${f#"$box"} in
	/busybox.demo | "$busybox") ;;
	*) files+=("${f#"$box"}") ;;
	esac
done < <(
	{
		find "$box/etc/motd" "$box/etc/group" "$box/etc/passwd" "$box/etc/hostname" -maxdepth 0 -type f -print0
		find "$box/etc" "$box/home" "$box/usr/share" -xdev -type f -size -64k -links 1 -print0 | sort -z
		find "$box" -xdev -type f -size -64k -links 1 -print0 | sort -z
	} 2>/dev/null | awk 'BEGIN { RS = ORS = "\0" } !seen[$0]++ && n++ < 7' || true
)
# And a directory to empty and fill again, so that it becomes opaque.
emptied=$({ find "$box/opt" "$box/usr/share" "$box/var" -mindepth 2 -xdev -type f -print0 2>/dev/null || true; } | sort -z | head -z -n 1 | tr -d '\0')
emptied=${emptied#"$box"}
emptied=${emptied%/*}
kept=()
for f in "${files[@]}"; do
	case $f in
	"$emptied"/*) ;;
	*) kept+=("$f") ;;
	esac
done
cat >"$box/.demo.sh" <<'INSIDE'
set -eu
b=$1 emptied=$2
shift 2
do_() {
	printf '  %s\n' "$*"
	"$b" "$@"
}
write() {
	printf '  echo %s >>%s\n' "$1" "$2"
	echo "$1" >>"$2"
}
[ $# -lt 1 ] || write 'a line more' "$1"
[ $# -lt 2 ] || do_ rm "$2"
[ $# -lt 3 ] || do_ mv "$3" "$3.renamed"
[ $# -lt 4 ] || do_ chmod 4711 "$4"
[ $# -lt 5 ] || do_ chown 1234:5678 "$5"
[ $# -lt 6 ] || do_ touch -d '2001-02-03 04:05:06' "$6"
if [ -n "$emptied" ]; then
	do_ rm -r "$emptied"
	do_ mkdir "$emptied"
	write new "$emptied/after"
fi
do_ mkdir -p /demo/sub
write 'one file, two names' /demo/one
do_ ln /demo/one /demo/two
do_ ln -s ../demo/one /demo/sub/symlink
do_ mknod /demo/null c 1 3
do_ mkfifo -m 640 /demo/fifo
do_ cp /demo/source /demo/three-megabytes
do_ rm /demo/source
do_ truncate -s 20M /demo/sparse
"$b" rm -f /.demo.sh /busybox.demo
INSIDE
mkdir -p "$box/demo"
head -c 3000000 /dev/urandom >"$box/demo/source"
run chroot "$box" "$busybox" sh /.demo.sh "$busybox" "$emptied" "${kept[@]}"
if command -v setfattr >/dev/null && setfattr -n user.demo -v kept "$box/demo/one" 2>/dev/null; then
	echo "  (from outside: setfattr -n user.demo -v kept /demo/one)"
fi
if command -v setcap >/dev/null && setcap cap_net_raw+ep "$box/demo/three-megabytes" 2>/dev/null; then
	echo "  (from outside: setcap cap_net_raw+ep /demo/three-megabytes)"
fi
if chroot "$box" /bin/sh -c 'echo "hello from the shell of the image" >/demo/hello' 2>/dev/null; then
	echo "  /bin/sh -c 'echo hello from the shell of the image >/demo/hello'"
fi

say "What has changed, without looking at a single file that has not"
run overlay2 changes box --tree

say "The changes as a tar, deletions as whiteouts (.wh.NAME)"
run overlay2 diff box -o "$work/changes.tar"
if command -v tar >/dev/null; then
	run tar tvf "$work/changes.tar"
fi

say "Commit them as a new layer, and export the image for other tools"
run overlay2 commit box --name demo:changed -m "made by the demo"
run overlay2 export demo:changed --to "$work/changed.tar"
run overlay2 tree

say "Import the export somewhere else, mount it, compare with what was mounted here"
echo "  (content, modes, owners, times to the nanosecond, xattrs, devices, hard links)"
export OVERLAY2_ROOT=$work/elsewhere
run overlay2 import "$work/changed.tar"
[ "$(overlay2 ls --json | grep -A1 '"demo:changed"')" = "$(OVERLAY2_ROOT=$work/root overlay2 ls --json | grep -A1 '"demo:changed"')" ] ||
	die "the image has another id there"
run overlay2 create copy --from demo:changed
run overlay2 mount copy
run overlay2 compare "$box" "$work/elsewhere/overlay2/copy/merged"

say "Remove everything, and look for what is left"
run overlay2 check
run overlay2 umount copy
run overlay2 rm copy demo:changed
overlay2 check >/dev/null
export OVERLAY2_ROOT=$work/root
run overlay2 check
run overlay2 umount box
run overlay2 rm box demo:changed demo:base
run overlay2 ls
[ -z "$(mounts)" ] || die "still mounted: $(mounts)"
for root in root elsewhere; do
	left=$(cd "$work/$root" && find . -mindepth 1 ! -type d ! -path ./lock && find overlay2 -mindepth 1 ! -path overlay2/l ! -path overlay2/staging)
	[ -z "$left" ] || die "left in $root: $left"
done
printf '\n%sNo mount, no layer, no file is left. %d seconds.%s\n' "$bold" "$SECONDS" "$plain"
