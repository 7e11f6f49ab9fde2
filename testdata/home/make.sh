#!/bin/bash
# Makes docker-VERSION.tar.gz, a home as a real dockerd leaves it, and beside it what Docker
# says about it (docker-VERSION.txt). Needs root, dockerd and its client; nothing of the
# network. The ids of layers are random, so two runs differ.
set -euo pipefail
cd "$(dirname "$0")"
out=$PWD
work=$(mktemp -d "${TMPDIR:-/tmp}/home-XXXXXX")
export DOCKER_HOST=unix://$work/sock
client=${DOCKER:-/usr/bin/docker}
daemon=

start() {
	dockerd --storage-driver overlay2 --data-root "$work/data" --exec-root "$work/exec" -H "$DOCKER_HOST" -p "$work/pid" \
		--iptables=false --ip6tables=false --ip-forward=false --bridge=none >"$work/log" 2>&1 &
	daemon=$!
	for _ in $(seq 100); do
		"$client" version >/dev/null 2>&1 && return
		sleep 0.2
	done
	tail "$work/log" >&2
	return 1
}
stop() {
	[ -z "$daemon" ] || { kill "$daemon" && wait "$daemon"; } || true
	daemon=
}
cleanup() {
	stop
	awk -v dir="$work/" 'index($5, dir) == 1 { print $5 }' /proc/self/mountinfo | tac | xargs -r -n1 umount -l
	rm -rf --one-file-system "$work"
}
trap cleanup EXIT

# layer N packs the directory $work/N as a layer of the image.
layers=() diffids=()
layer() {
	local tar=$work/image/$1.tar
	mkdir -p "$work/image"
	tar -C "$work/$1" --sort=name --numeric-owner --mtime=@1000000000 --format=posix --xattrs --xattrs-include='*' -cf "$tar" .
	layers+=("\"$1.tar\"")
	diffids+=("\"sha256:$(sha256sum "$tar" | cut -d' ' -f1)\"")
}
join() { local IFS=,; echo "$*"; }

a=$work/a b=$work/b c=$work/c
mkdir -p "$a"/{etc,bin,var/cache/old,var/lib,dev} "$b"/{etc,var/cache,opt} "$c"/{etc,var/lib}
echo root:x:0:0 >"$a"/etc/passwd
echo gone >"$a"/etc/gone
echo changed >"$a"/etc/changed
echo cached >"$a"/var/cache/old/f
echo data >"$a"/var/lib/data
printf '#!/bin/tool\n' >"$a"/bin/tool
chmod 4755 "$a"/bin/tool
ln "$a"/bin/tool "$a"/bin/same
ln -s ../bin/tool "$a"/etc/link
mkfifo "$a"/var/pipe
mknod "$a"/dev/null c 1 3
chown 5:6 "$a"/var/lib
chmod 2770 "$a"/var/lib
# Not on the file with two names: Docker's chown of the second takes a capability away.
echo ping >"$a"/bin/ping
setcap cap_net_raw+ep "$a"/bin/ping
setfattr -n user.note -v kept "$a"/bin/ping
layer a
echo new >"$b"/etc/new
echo changed again >"$b"/etc/changed
: >"$b"/etc/.wh.gone
: >"$b"/var/cache/.wh..wh..opq
echo fresh >"$b"/var/cache/fresh
layer b
rmdir "$c"/var/lib
: >"$c"/var/.wh.lib
echo now a file >"$c"/etc/new
ln -s /nowhere "$c"/bin
layer c
config='{"architecture":"amd64","os":"linux","config":{"Cmd":["/bin/tool"]},"rootfs":{"type":"layers","diff_ids":['"$(join "${diffids[@]}")"']},"history":[{},{},{}]}'
name=$(sha256sum <<<"$config" | cut -d' ' -f1).json
echo "$config" >"$work/image/$name"
echo '[{"Config":"'"$name"'","RepoTags":["home:1"],"Layers":['"$(join "${layers[@]}")"']}]' >"$work/image/manifest.json"

start
version=$("$client" version -f '{{.Server.Version}}' | grep -o '^[0-9]*\.[0-9]*')
tar -C "$work/image" -c . | "$client" load
"$client" create --network none --name one home:1 >/dev/null
echo by hand >"$work/hand"
"$client" cp "$work/hand" one:/etc/hand
"$client" cp "$work/hand" one:/etc/passwd
"$client" commit one home:2 >/dev/null
"$client" create --network none --name two home:2 >/dev/null
"$client" cp "$work/hand" two:/opt/two
{
	echo "# docker $version: images and containers by their top layer, then docker diff of each container"
	for image in home:1 home:2; do echo "$image $("$client" image inspect -f '{{.GraphDriver.Data.UpperDir}}' $image | sed 's|.*/\([^/]*\)/diff|\1|')"; done
	for box in one two; do
		echo "$box $("$client" inspect -f '{{.GraphDriver.Data.UpperDir}}' $box | sed 's|.*/\([^/]*\)/diff|\1|')"
		"$client" diff $box | sort -k2 | sed "s/^/$box /"
	done
} >"$out/docker-$version.txt"
stop
tar -C "$work/data/overlay2" --sort=name --numeric-owner --format=posix --pax-option=delete=atime,delete=ctime \
	--xattrs --xattrs-include='*' --exclude=./backingFsBlockDev -cf - . | gzip -9n >"$out/docker-$version.tar.gz"
echo "made docker-$version.tar.gz, $(stat -c %s "$out/docker-$version.tar.gz") bytes"
