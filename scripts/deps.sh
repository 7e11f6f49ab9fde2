#!/bin/bash
# Installs by apt-get what the tests and checks call and this machine lacks. Does nothing, and needs no
# network, when all is there. Without root or apt-get it only tells: tests that need
# a missing program are skipped with its name. `deps.sh clients` installs other image tools too.
set -euo pipefail

# program=package
wanted=(
	mkfs.ext4=e2fsprogs mkfs.xfs=xfsprogs mkfs.btrfs=btrfs-progs losetup=mount
	getfattr=attr setcap=libcap2-bin tar=tar bsdtar=libarchive-tools zstd=zstd xz=xz-utils
	gcc=gcc git=git shellcheck=shellcheck
	dockerd=docker.io containerd=containerd runc=runc
)

[ "${1:-}" != clients ] || wanted+=(skopeo=skopeo umoci=umoci buildah=buildah podman=podman docker-registry=docker-registry)

packages=()
for w in "${wanted[@]}"; do
	PATH=$PATH:/usr/sbin:/sbin command -v "${w%%=*}" >/dev/null || packages+=("${w#*=}")
done
# The race detector links with the C library.
[ -e /usr/include/stdlib.h ] || packages+=(libc6-dev)
[ ${#packages[@]} -gt 0 ] || exit 0

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
	echo "missing, tests that need them are skipped: ${packages[*]}" >&2
	exit 0
fi
echo "installing ${packages[*]}"
apt=(apt-get -o DPkg::Lock::Timeout=300 -o APT::Sandbox::User=root -q)
export DEBIAN_FRONTEND=noninteractive
"${apt[@]}" update </dev/null >/dev/null
"${apt[@]}" install -y --no-install-recommends "${packages[@]}" </dev/null >/dev/null
