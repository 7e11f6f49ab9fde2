package main

import (
	"archive/tar"
	"bytes"
	"fmt"
	"strings"
	"time"

	"github.com/bcc2decd/overlay2/cmd/overlay2/internal/image"
)

// layer is one layer of the image.
type layer struct {
	what     string
	compress string
	entries  []entry
}

// entry is one entry of a layer's tar, its time set.
type entry struct {
	tar.Header
	body string
}

// capNetRaw is the xattr security.capability that setcap cap_net_raw+ep writes: revision 2
// with the effective bit, permitted 1<<13 (linux/capability.h).
const capNetRaw = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

// xattr is the PAX key of an extended attribute.
func xattr(name string) string { return "SCHILY.xattr." + name }

func dir(name string, mode int64) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: mode}}
}

func file(name string, mode int64, body string) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(body))}, body: body}
}

func symlink(name, target string) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}}
}

func hardlink(name, target string) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target}}
}

func device(kind byte, name string, mode, major, minor int64) entry {
	return entry{Header: tar.Header{Typeflag: kind, Name: name, Mode: mode, Devmajor: major, Devminor: minor}}
}

func (e entry) owned(uid, gid int) entry {
	e.Uid, e.Gid = uid, gid
	return e
}

func (e entry) at(t time.Time) entry {
	e.ModTime = t
	return e
}

func (e entry) with(name, value string) entry {
	e.PAXRecords = map[string]string{xattr(name): value}
	return e
}

// applets are the busybox programs that the image has by name.
const applets = "cat chgrp chmod chown cp date dd df du echo env false find grep head id ln ls " +
	"md5sum mkdir mkfifo mknod mv pwd readlink rm rmdir sed sh sha256sum sleep sort stat sync tail tar tee test touch tr true truncate uname vi wc xargs"

// layers returns the image's layers, base first.
func layers(busybox, copyright []byte) []layer {
	base := []entry{
		dir("bin", 0o755), dir("dev", 0o755), dir("etc", 0o755), dir("home", 0o755), dir("opt", 0o755),
		dir("opt/app", 0o755), dir("opt/legacy", 0o755), dir("opt/legacy/deep", 0o755), dir("proc", 0o555), dir("root", 0o700), dir("sys", 0o555),
		dir("tmp", 0o1777), dir("usr", 0o755), dir("usr/local", 0o755), dir("usr/local/bin", 0o755), dir("usr/share", 0o755), dir("usr/share/doc", 0o755),
		dir("usr/share/doc/busybox-static", 0o755), dir("var", 0o755), dir("var/log", 0o755), dir("var/run", 0o755),
		file(busyboxPath, 0o755, string(busybox)),
		file(copyrightPath, 0o644, string(copyright)),
		file("etc/group", 0o644, "root:x:0:\nmail:x:8:\ndemo:x:1000:\n"),
		file("etc/motd", 0o644, "A busybox on overlay2.\n"),
		file("etc/old.conf", 0o644, "this file is deleted by a later layer\n"),
		file("etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\ndemo:x:1000:1000::/home/demo:/bin/sh\n"),
		file("opt/app/one", 0o644, "hidden by an opaque directory\n"),
		file("opt/app/two", 0o644, "this too\n"),
		file("opt/legacy/deep/file", 0o644, "goes with its directory\n"),
		file("var/was-a-file", 0o644, "a directory takes its place\n"),
		dir("var/was-a-directory", 0o755),
		file("var/was-a-directory/inside", 0o644, "a file takes its place\n"),
	}
	base = append(base, hardlink("bin/ash", busyboxPath))
	for _, a := range strings.Fields(applets) {
		base = append(base, symlink("bin/"+a, "busybox"))
	}
	return []layer{
		{"busybox, a root filesystem around it", image.CompressGzip, base},
		{"a user, special modes, extended attributes", image.CompressZstd, []entry{
			dir("home/demo", 0o750).owned(1000, 1000),
			file("home/demo/notes", 0o600, "one file, three names\n").owned(1000, 1000),
			hardlink("home/demo/notes.again", "home/demo/notes").owned(1000, 1000),
			hardlink("home/demo/notes.thrice", "home/demo/notes").owned(1000, 1000),
			file("home/demo/tagged", 0o644, "has an attribute\n").owned(1000, 1000).with("user.overlay2.demo", "kept\x00binary"),
			file("usr/local/bin/as-root", 0o4755, "#!/bin/sh\nid\n"),
			file("usr/local/bin/as-mail", 0o2755, "#!/bin/sh\nid\n").owned(0, 8),
			file("usr/local/bin/raw", 0o755, "#!/bin/sh\n# may open raw sockets\n").with("security.capability", capNetRaw),
			dir("var/mail", 0o2775).owned(0, 8),
		}},
		{"deletions: whiteouts and an opaque directory", image.CompressNone, []entry{
			file("etc/.wh.old.conf", 0, ""),
			file("etc/motd", 0o644, "A busybox on overlay2, changed by the third layer.\n"),
			file("opt/.wh.legacy", 0, ""),
			dir("opt/app", 0o755),
			file("opt/app/.wh..wh..opq", 0, ""),
			file("opt/app/three", 0o644, "the only one left\n"),
		}},
		{"devices, a fifo, symlinks, odd names, owners and times", image.CompressGzip, []entry{
			device(tar.TypeChar, "dev/console", 0o600, 5, 1),
			device(tar.TypeBlock, "dev/loop9", 0o660, 7, 9).owned(0, 6),
			device(tar.TypeChar, "dev/null", 0o666, 1, 3),
			device(tar.TypeChar, "dev/zero", 0o666, 1, 5),
			device(tar.TypeFifo, "var/run/pipe", 0o640, 0, 0).owned(1000, 8),
			symlink("var/absolute", "/etc/motd"), symlink("var/relative", "../etc/motd"), symlink("var/dangling", "nowhere/at/all"),
			symlink("var/log/owned", "by somebody").owned(1000, 1000),
			file("var/log/"+strings.Repeat("long", 60), 0o644, "a name of 240 characters\n"),
			file("var/log/naïve — 日本語", 0o644, "a name in UTF-8\n"),
			file("var/log/two\nlines", 0o644, "a name with a newline\n"),
			file("var/log/stranger", 0o640, "an owner beyond 2^21\n").owned(3_000_000, 4_000_000),
			file("var/log/ancient", 0o644, "older than the epoch\n").at(time.Date(1969, 7, 20, 20, 17, 40, 5, time.UTC)),
			file("var/log/empty", 0o644, ""),
			dir("var/empty", 0o711),
		}},
		{"a file for a directory, a directory for a file", image.CompressZstd, []entry{
			file("var/.wh.was-a-directory", 0, ""),
			file("var/was-a-directory", 0o644, "now a file\n"),
			dir("var/was-a-file", 0o700),
			file("var/was-a-file/inside", 0o600, "now in a directory\n"),
			file("usr/local/bin/hello", 0o755, "#!/bin/sh\necho hello from layer five\n"),
		}},
	}
}

// pack writes a layer's tar. Every entry has the image's time, if it has none of its own.
func pack(entries []entry) ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := e.Header
		if h.ModTime.IsZero() {
			h.ModTime = epoch
		}
		h.Format = tar.FormatPAX
		if err := w.WriteHeader(&h); err != nil {
			return nil, fmt.Errorf("%s: %w", h.Name, err)
		}
		if _, err := w.Write([]byte(e.body)); err != nil {
			return nil, fmt.Errorf("%s: %w", h.Name, err)
		}
	}
	err := w.Close()
	return b.Bytes(), err
}
