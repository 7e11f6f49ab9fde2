package archive

import (
	"bytes"
	"math"
	"strconv"
)

const (
	// maxFragments bounds the pieces of a sparse file (CVE-2025-58183: a map without
	// bound, compressed to nothing, takes all memory). Each needs 16 bytes of it.
	maxFragments = 1 << 20
	// fragmentSize is the size of an old GNU fragment: an offset and a length of 12 each.
	fragmentSize = 24
	// fragmentsPerBlock is how many of them an extension block holds; a flag follows.
	fragmentsPerBlock = 21
)

// fragment is a piece of a sparse file that holds data.
type fragment struct{ offset, length int64 }

// paxSparse are the GNU.sparse.* records, versions 0.0, 0.1 and 1.0.
type paxSparse struct {
	major, minor, name, size, realsize, blocks string
	// numbers are the map of 0.0 and 0.1: offset, length, offset, length...
	numbers []int64
	has     bool // a map was given
}

func (p *paxSparse) set(key string, value []byte) error {
	switch key {
	case "major":
		p.major = string(value)
	case "minor":
		p.minor = string(value)
	case "name":
		if bytes.IndexByte(value, 0) >= 0 {
			return malformed("extended header: NUL in a name")
		}
		p.name = string(value)
	case "size":
		p.size = string(value)
	case "realsize":
		p.realsize = string(value)
	case "numblocks":
		p.blocks = string(value)
	case "offset", "numbytes":
		if (key == "offset") != (len(p.numbers)%2 == 0) {
			return malformed("sparse map: %s out of order", key)
		}
		p.has = true
		return p.add(value)
	case "map":
		p.numbers, p.has = nil, true
		for v := range bytes.SplitSeq(value, []byte(",")) {
			if len(v) == 0 && len(value) == 0 {
				break
			}
			if err := p.add(v); err != nil {
				return err
			}
		}
	}
	return nil
}

func (p *paxSparse) add(value []byte) error {
	n, err := strconv.ParseInt(string(value), 10, 64)
	if err != nil || n < 0 {
		return malformed("sparse map: number %.40q", value)
	}
	if len(p.numbers) >= 2*maxFragments {
		return malformed("sparse map: more than %d fragments", maxFragments)
	}
	p.numbers = append(p.numbers, n)
	return nil
}

// readSparse reads the map of a sparse file, whatever form it has, and checks it.
func (t *tarReader) readSparse(h *tarHeader, flag byte, e *tarEntry) (err error) {
	p := &t.pax.sparse
	switch {
	case flag == typeGNUHole:
		err = t.readOldSparse(h, e)
	case p.major == "1" && p.minor == "0":
		if err = p.apply(e); err == nil {
			err = t.readSparseBody(e)
		}
	case (p.major == "" || p.major == "0") && p.has:
		if err = p.apply(e); err == nil {
			err = p.fragments(e)
		}
	case p.major != "" || p.minor != "" || p.realsize != "":
		return malformed("unknown sparse format %.10q.%.10q", p.major, p.minor)
	default:
		return nil
	}
	if err != nil {
		return err
	}
	if e.kind != typeReg {
		return malformed("sparse, and not a regular file")
	}
	e.sparse = true
	return e.checkFragments(t.left)
}

// apply takes over the name and size that the records give the file: the header has
// those of the piece of archive.
func (p *paxSparse) apply(e *tarEntry) error {
	if p.name != "" {
		e.name = p.name
	}
	size := p.size
	if size == "" {
		size = p.realsize
	}
	if size == "" {
		return nil
	}
	n, err := strconv.ParseInt(size, 10, 64)
	if err != nil || n < 0 {
		return malformed("sparse file of size %.40q", size)
	}
	e.size = n
	return nil
}

// fragments takes over the map of versions 0.0 and 0.1.
func (p *paxSparse) fragments(e *tarEntry) error {
	if len(p.numbers)%2 != 0 {
		return malformed("sparse map with an odd count of numbers")
	}
	if p.blocks != "" {
		n, err := strconv.Atoi(p.blocks)
		if err != nil || n != len(p.numbers)/2 {
			return malformed("sparse map of %d fragments, %.20q announced", len(p.numbers)/2, p.blocks)
		}
	}
	e.fragments = make([]fragment, 0, len(p.numbers)/2)
	for i := 0; i < len(p.numbers); i += 2 {
		e.fragments = append(e.fragments, fragment{p.numbers[i], p.numbers[i+1]})
	}
	return nil
}

// readOldSparse reads GNU's own format: four fragments in the header, then blocks of 21.
func (t *tarReader) readOldSparse(h *tarHeader, e *tarEntry) error {
	if !h.isGNU() {
		return malformed("a sparse file without a GNU header")
	}
	size, err := h.number(gnuRealField)
	if err != nil || size < 0 {
		return malformed("sparse file's real size")
	}
	e.size = size
	more := h.bytes(gnuMoreField)[0] > 0
	list := h.bytes(gnuSparseField)
	for {
		if err := e.addOldFragments(list); err != nil {
			return err
		}
		if !more {
			return nil
		}
		b, err := t.src.block()
		if err != nil {
			return eofUnexpected(err)
		}
		list = b[:fragmentsPerBlock*fragmentSize]
		more = b[len(list)] > 0
	}
}

func (e *tarEntry) addOldFragments(list []byte) error {
	for ; len(list) >= fragmentSize && list[0] != 0; list = list[fragmentSize:] {
		offset, err1 := parseNumber(list[:12])
		length, err2 := parseNumber(list[12:fragmentSize])
		if err1 != nil || err2 != nil {
			return malformed("sparse map: no number")
		}
		if len(e.fragments) == maxFragments {
			return malformed("sparse map: more than %d fragments", maxFragments)
		}
		e.fragments = append(e.fragments, fragment{offset, length})
	}
	return nil
}

// readSparseBody reads the map of version 1.0, which is in front of the body, in whole
// blocks: a count and then offsets and lengths, each a decimal number on a line.
func (t *tarReader) readSparseBody(e *tarEntry) error {
	var block []byte
	number := func() (int64, error) {
		var n int64
		for digits := 0; ; digits++ {
			if len(block) == 0 {
				if t.left < blockSize {
					return 0, malformed("sparse map: longer than the body")
				}
				b, err := t.src.block()
				if err != nil {
					return 0, eofUnexpected(err)
				}
				t.left -= blockSize
				block = b
			}
			c := block[0]
			block = block[1:]
			if c == '\n' && digits > 0 {
				return n, nil
			}
			if c < '0' || c > '9' || n > (math.MaxInt64-9)/10 {
				return 0, malformed("sparse map: no number")
			}
			n = n*10 + int64(c-'0')
		}
	}
	count, err := number()
	if err != nil {
		return err
	}
	if count > maxFragments {
		return malformed("sparse map: %d fragments, the limit is %d", count, maxFragments)
	}
	for range count {
		offset, err := number()
		if err != nil {
			return err
		}
		length, err := number()
		if err != nil {
			return err
		}
		e.fragments = append(e.fragments, fragment{offset, length})
	}
	return nil
}

// checkFragments wants fragments in order, apart and within the file, and as much data as
// the archive holds, which is stored bytes.
func (e *tarEntry) checkFragments(stored int64) error {
	var end, sum int64
	for _, f := range e.fragments {
		if f.length < 0 || f.offset < end || f.offset > e.size || f.length > e.size-f.offset {
			return malformed("sparse map: %d bytes at %d in a file of %d", f.length, f.offset, e.size)
		}
		end = f.offset + f.length
		sum += f.length
	}
	if sum != stored {
		return malformed("sparse map of %d bytes over %d", sum, stored)
	}
	return nil
}
