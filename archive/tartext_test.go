package archive

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"testing"
)

// tarText makes a tar from a text, one entry a line:
//
//	file NAME [MODE] ["content"]     dir NAME [MODE]      fifo NAME
//	symlink NAME -> TARGET           link NAME -> TARGET
//	char NAME MAJOR:MINOR            block NAME MAJOR:MINOR
//
// Words after the name: uid= gid= size= (in the header, whatever the content) major= minor=
// mtime= type= (the flag), fmt=ustar|gnu|v7, sum=bad, sum=signed, pax.KEY=VALUE (a record of an
// extended header), gnuname= gnulink= (GNU's long ones), and any with a dot before its "=" is an
// xattr. NAME and all words may be quoted as in Go. Further lines:
//
//	global pax.KEY=VALUE...          a global extended header
//	raw TYPE "content"               an entry of any type with a body
//	bytes "..."                      bytes as they are
//	zeros N                          N blocks of zeros
//	noend                            no end-of-archive marker at the end
//	cut N                            the last N bytes are missing
func tarText(text string) ([]byte, error) {
	w := tarTextWriter{end: true}
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		words, err := textWords(line)
		if err == nil {
			err = w.line(words)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", line, err)
		}
	}
	if w.end {
		w.out = append(w.out, make([]byte, 2*blockSize)...)
	}
	if w.cut > len(w.out) {
		return nil, errors.New("cut beyond the start")
	}
	return w.out[:len(w.out)-w.cut], nil
}

// mustTar is tarText for a text that is right.
func mustTar(t testing.TB, text string) []byte {
	t.Helper()
	b, err := tarText(text)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

type tarTextWriter struct {
	out []byte
	end bool
	cut int
}

// textWord is a word of a line; whole says that all of it was quoted.
type textWord struct {
	text  string
	whole bool
}

func textWords(line string) ([]textWord, error) {
	var words []textWord
	for line = strings.TrimLeft(line, " \t"); line != ""; line = strings.TrimLeft(line, " \t") {
		word := textWord{whole: line[0] == '"'}
		var text strings.Builder
		for line != "" && line[0] != ' ' && line[0] != '\t' {
			if line[0] != '"' {
				n := strings.IndexAny(line, " \t\"")
				if n < 0 {
					n = len(line)
				}
				text.WriteString(line[:n])
				line = line[n:]
				continue
			}
			quoted, err := strconv.QuotedPrefix(line)
			if err != nil {
				return nil, err
			}
			s, err := strconv.Unquote(quoted)
			if err != nil {
				return nil, err
			}
			text.WriteString(s)
			line = line[len(quoted):]
		}
		word.text = text.String()
		words = append(words, word)
	}
	return words, nil
}

// textEntry is an entry before it is written.
type textEntry struct {
	name, link, body         string
	typ                      byte
	mode, uid, gid, mtime    int64
	major, minor             int64
	size                     int64
	hasSize                  bool
	format, sum              string
	gnuName, gnuLink         string
	pax                      []string
	rawSize, rawUID, rawMode string
	prefix, starPrefix       string
	sparse                   string // of an old GNU header: 4 fragments, flag, real size
}

var textKinds = map[string]byte{
	"file": '0', "link": '1', "symlink": '2', "char": '3', "block": '4', "dir": '5', "fifo": '6', "cont": '7', "sparse": 'S',
}

func (w *tarTextWriter) line(words []textWord) error {
	arg := func() (int, error) {
		if len(words) < 2 {
			return 0, errors.New("no argument")
		}
		return strconv.Atoi(words[1].text)
	}
	var err error
	switch words[0].text {
	case "noend":
		w.end = false
		return nil
	case "cut":
		w.cut, err = arg()
		return err
	case "zeros":
		n, err := arg()
		w.out = append(w.out, make([]byte, n*blockSize)...)
		return err
	case "bytes":
		w.out = append(w.out, words[1].text...)
		return nil
	case "global":
		e := textEntry{mode: 0o644}
		for _, word := range words[1:] {
			if err := e.word(word); err != nil {
				return err
			}
		}
		w.write(&textEntry{name: "global", typ: 'g', body: strings.Join(e.pax, "")})
		return nil
	case "raw":
		e := textEntry{name: "raw", typ: words[1].text[0], mode: 0o644}
		for _, word := range words[2:] {
			if err := e.word(word); err != nil {
				return err
			}
		}
		w.write(&e)
		return nil
	}
	typ, ok := textKinds[words[0].text]
	if !ok || len(words) < 2 {
		return errors.New("unknown kind")
	}
	e := textEntry{name: words[1].text, typ: typ, mode: 0o644, mtime: 1000000000}
	if typ == typeDir {
		e.mode = 0o755
	}
	for i := 2; i < len(words); i++ {
		if words[i].text == "->" && i+1 < len(words) {
			i++
			e.link = words[i].text
			continue
		}
		if err := e.word(words[i]); err != nil {
			return fmt.Errorf("%q: %w", words[i].text, err)
		}
	}
	w.entry(&e)
	return nil
}

func (e *textEntry) word(word textWord) (err error) {
	if word.whole {
		e.body += word.text
		return nil
	}
	key, value, ok := strings.Cut(word.text, "=")
	if !ok {
		if major, minor, ok := strings.Cut(word.text, ":"); ok {
			e.major, err = strconv.ParseInt(major, 10, 64)
			if err == nil {
				e.minor, err = strconv.ParseInt(minor, 10, 64)
			}
			return err
		}
		e.mode, err = strconv.ParseInt(word.text, 8, 64)
		return err
	}
	number := map[string]*int64{"uid": &e.uid, "gid": &e.gid, "size": &e.size, "mtime": &e.mtime, "major": &e.major, "minor": &e.minor}
	text := map[string]*string{
		"fmt": &e.format, "sum": &e.sum, "gnuname": &e.gnuName, "gnulink": &e.gnuLink, "rawsize": &e.rawSize,
		"rawuid": &e.rawUID, "rawmode": &e.rawMode, "prefix": &e.prefix, "starprefix": &e.starPrefix, "map": &e.sparse, "link": &e.link,
	}
	switch {
	case number[key] != nil:
		*number[key], err = strconv.ParseInt(value, 10, 64)
		e.hasSize = e.hasSize || key == "size"
	case text[key] != nil:
		*text[key] = value
	case key == "type":
		e.typ = (value + "\x00")[0]
	case strings.HasPrefix(key, "pax."):
		e.pax = append(e.pax, paxRecord(key[4:], value))
	case strings.Contains(key, "."):
		e.pax = append(e.pax, paxRecord("SCHILY.xattr."+key, value))
	default:
		return errors.New("unknown word")
	}
	return err
}

func paxRecord(key, value string) string {
	size := len(key) + len(value) + 3
	n := size + len(strconv.Itoa(size))
	if len(strconv.Itoa(n)) > len(strconv.Itoa(size)) {
		n++
	}
	return fmt.Sprintf("%d %s=%s\n", n, key, value)
}

// entry writes an entry with the extended headers that it needs.
func (w *tarTextWriter) entry(e *textEntry) {
	if e.format == "gnu" {
		if len(e.name) > 100 && e.gnuName == "" {
			e.gnuName = e.name
		}
		if len(e.link) > 100 && e.gnuLink == "" {
			e.gnuLink = e.link
		}
	} else {
		if len(e.name) > 100 {
			e.pax = append(e.pax, paxRecord("path", e.name))
		}
		if len(e.link) > 100 {
			e.pax = append(e.pax, paxRecord("linkpath", e.link))
		}
	}
	if len(e.pax) > 0 {
		w.write(&textEntry{name: "pax", typ: 'x', body: strings.Join(e.pax, "")})
	}
	if e.gnuName != "" {
		w.write(&textEntry{name: "././@LongLink", typ: 'L', body: e.gnuName + "\x00", format: "gnu"})
	}
	if e.gnuLink != "" {
		w.write(&textEntry{name: "././@LongLink", typ: 'K', body: e.gnuLink + "\x00", format: "gnu"})
	}
	w.write(e)
}

// write writes one header and body.
func (w *tarTextWriter) write(e *textEntry) {
	var h tarHeader
	copy(h[:100], e.name)
	putNumber(h[100:108], e.mode)
	putNumber(h[108:116], e.uid)
	putNumber(h[116:124], e.gid)
	size := int64(len(e.body))
	if e.hasSize {
		size = e.size
	}
	putNumber(h[124:136], size)
	putNumber(h[136:148], e.mtime)
	copy(h[100:108], e.rawMode)
	copy(h[108:116], e.rawUID)
	copy(h[124:136], e.rawSize)
	h[156] = e.typ
	copy(h[157:257], e.link)
	switch e.format {
	case "v7":
	case "gnu":
		copy(h[257:], "ustar  \x00")
	default:
		copy(h[257:], "ustar\x0000")
	}
	if e.format != "v7" {
		putNumber(h[329:337], e.major)
		putNumber(h[337:345], e.minor)
	}
	copy(h[345:500], e.prefix)
	if e.starPrefix != "" {
		copy(h[345:476], e.starPrefix)
		copy(h[508:], "tar\x00")
	}
	copy(h[386:495], e.sparse)
	w.out = append(w.out, h.sealed(e.sum)...)
	// The header of an old sparse file is followed by its map; the body holds both.
	w.out = append(w.out, e.body...)
	w.out = append(w.out, make([]byte, padding(int64(len(e.body))))...)
}

// sealed returns the header with its checksum.
func (h tarHeader) sealed(how string) []byte {
	copy(h[148:156], "        ")
	sum := 0
	for _, c := range h {
		if how == "signed" {
			sum += int(int8(c))
		} else {
			sum += int(c)
		}
	}
	if how == "bad" {
		sum++
	}
	copy(h[148:156], fmt.Sprintf("%06o\x00 ", sum))
	return h[:]
}

// putNumber writes octal digits, or base 256 where these don't fit.
func putNumber(b []byte, n int64) {
	s := strconv.FormatInt(n, 8)
	if n >= 0 && len(s) < len(b) {
		copy(b, strings.Repeat("0", len(b)-1-len(s))+s)
		return
	}
	for i := len(b) - 1; i >= 0; i-- {
		b[i] = byte(n)
		n >>= 8
	}
	b[0] |= 0x80
}
