#!/bin/bash
# Makes the layers that the benchmarks unpack, from Debian packages.
#
#   make.sh DIRECTORY SET...     sets: quick, typical, many-small, few-big
#
# Each set becomes DIRECTORY/SET.tar: one tar as an image builder writes it, names sorted,
# without a leading "./". A set that is there already is kept. What came out is printed:
# sha256, bytes, entries, name. The packages are those of the Debian this runs on, so
# another release gives other bytes; a run says which it had.
set -euo pipefail
export LC_ALL=C

die() { echo "make.sh: $*" >&2; exit 1; }

[ $# -ge 2 ] || die "usage: make.sh DIRECTORY SET..."
for tool in apt-get apt-cache dpkg-deb tar; do
	command -v "$tool" >/dev/null || die "$tool is missing: the data is made from Debian packages"
done
[ "$(id -u)" = 0 ] || die "must be run as root, to keep the owners of files"
mkdir -p "$1"
dir=$(cd "$1" && pwd)
shift

# closure prints the packages named and all that they depend on. A virtual package has
# nothing to download; apt-cache show leaves it out.
closure() {
	apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks \
		--no-replaces --no-enhances "$@" | grep '^[a-z0-9]' | sed 's/:.*//' | sort -u |
		xargs apt-cache show --no-all-versions 2>/dev/null | awk '$1 == "Package:" { print $2 }' | sort -u
}

# first prints the first of the packages that this Debian has: "a|b|c".
first() {
	local p
	for p in ${1//|/ }; do
		if apt-cache show --no-all-versions "$p" >/dev/null 2>&1; then
			echo "$p"
			return
		fi
	done
	die "none of these packages is known here: $1 (has apt-get update been run?)"
}

# packages prints what a set is made of.
packages() {
	case $1 in
	quick) closure python3 perl ;;
	# A small system with what people install into it.
	typical) closure python3-setuptools git vim perl gcc locales systemd openssh-client manpages-dev iso-codes adwaita-icon-theme ;;
	many-small)
		first 'golang-1.19-src|golang-1.24-src|golang-1.25-src'
		first 'libboost1.81-dev|libboost1.83-dev|libboost1.88-dev'
		first 'papirus-icon-theme'
		;;
	few-big)
		first 'llvm-14-dev|llvm-19-dev|llvm-18-dev'
		first 'libclang-14-dev|libclang-19-dev|libclang-18-dev'
		first 'libllvm14|libllvm19|libllvm18'
		first 'ghc'
		;;
	*) die "no such set: $1" ;;
	esac
}

# prune leaves of a tree what the set is about.
prune() {
	case $1 in
	many-small)
		# Two of three icons are symlinks; what counts here is small files.
		find usr/share/icons -type l -delete
		;;
	few-big)
		# Files of at least 1 MiB, up to 1 GiB of them.
		find . -type f -size +1023k -printf '%s %p\n' | sort -k2 |
			awk '{ total += $1; if (total < 1073741824) print $2 }' | sort >../keep
		find . -type f | sort | comm -23 - ../keep | tr '\n' '\0' | xargs -0r rm --
		find . -type l -delete
		;;
	esac
	find . -mindepth 1 -type d -empty -delete
	# A directory has the time of the last thing made or deleted in it, with nanoseconds
	# that most peers do not keep: another sha256 each time, and answers that differ.
	find . -mindepth 1 -type d -exec touch -d @1700000000 {} +
}

tmp=
trap 'rm -rf "$tmp"' EXIT

make_set() {
	local set=$1 out=$dir/$1.tar list
	if [ ! -f "$out" ] || [ ! -f "$dir/$set.sum" ]; then
		tmp=$(mktemp -d "$dir/.$set.XXXXXX")
		list=$(packages "$set")
		mkdir "$tmp/debs" "$tmp/root"
		# shellcheck disable=SC2086 # one word a package
		(cd "$tmp/debs" && apt-get -q -o APT::Sandbox::User=root download $list >&2)
		for deb in "$tmp"/debs/*.deb; do
			dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$tmp/root" -f -
		done
		(cd "$tmp/root" && prune "$set")
		(cd "$tmp/root" && find . -mindepth 1 -maxdepth 1 -printf '%P\0' | sort -z |
			tar --create --file "$out.part" --sort=name --numeric-owner --format=posix \
				--pax-option=delete=atime,delete=ctime --null --files-from=-)
		printf '%s %s %s %s\n' "$(sha256sum <"$out.part" | cut -d' ' -f1)" "$(stat -c %s "$out.part")" \
			"$(tar --list --file "$out.part" | wc -l)" "$set.tar" >"$dir/$set.sum.part"
		mv "$out.part" "$out"
		mv "$dir/$set.sum.part" "$dir/$set.sum"
		rm -rf "$tmp"
	fi
	cat "$dir/$set.sum"
}

for set in "$@"; do
	make_set "$set"
done
