package archive

import (
	"errors"
	"strconv"

	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// packBody is the content of the file at hand.
type packBody struct {
	fd int // -1 if nothing is open
	// left is the number of bytes still to deliver, pad that of the zeros behind.
	left int64
	pad  int
	// sparse: only fragments is delivered.
	sparse    bool
	fragments []dataFragment
}

// dataFragment is a part of a sparse file that holds data.
type dataFragment struct{ offset, length int64 }

// maxRead bounds one read, so that cancelling never has to wait for long.
const maxRead = 4 << 20

// read delivers some of the content into b. What the file grew by since its header was
// written is left out; that it shrank is ErrChanged.
func (b *packBody) read(p []byte) (int, error) {
	p = p[:min(int64(len(p)), b.left, maxRead)]
	var n int
	var err error
	if b.sparse {
		f := &b.fragments[0]
		p = p[:min(int64(len(p)), f.length)]
		n, err = sys.Pread(b.fd, p, f.offset)
		f.offset += int64(n)
		if f.length -= int64(n); f.length == 0 {
			b.fragments = b.fragments[1:]
		}
	} else {
		n, err = sys.Read(b.fd, p)
	}
	if err != nil {
		return 0, err
	}
	if n == 0 {
		return 0, ErrChanged
	}
	if b.left -= int64(n); b.left == 0 {
		b.close()
	}
	return n, nil
}

func (b *packBody) close() {
	if b.fd >= 0 {
		_ = sys.Close(b.fd) // read only: nothing can be lost
	}
	b.fd = -1
}

const (
	// sparseAsk is the size from which on a file is asked for holes whatever its blocks say:
	// those count what a filesystem allocated ahead, which comes and goes.
	sparseAsk = 64 << 10
	// sparseSave is what leaving out the holes must save at least: the map costs 1.5 KiB and
	// readers that don't know sparse files unpack it badly.
	sparseSave = 16 << 10
	// sparseMost bounds the map. A file with more fragments is packed with its zeros.
	sparseMost = 1 << 16
)

// readFragments returns where fd has data if leaving out the rest pays, else nil. A file that is
// one hole has one empty fragment.
func readFragments(fd int, st *sys.Stat) ([]dataFragment, error) {
	if st.Size < sparseSave || (st.Size < sparseAsk && st.Blocks*512 >= st.Size) {
		return nil, nil
	}
	var fragments []dataFragment
	var data int64
	for at := int64(0); at < st.Size; {
		start, err := unix.Seek(fd, at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break // nothing but a hole from here on
		}
		if errors.Is(err, unix.EINVAL) {
			return nil, nil // the filesystem cannot tell
		}
		if err != nil {
			return nil, err
		}
		end, err := unix.Seek(fd, start, unix.SEEK_HOLE)
		if err != nil {
			return nil, err
		}
		start, end = min(start, st.Size), min(end, st.Size)
		if end <= start && start < st.Size {
			return nil, ErrChanged
		}
		if end > start {
			fragments = append(fragments, dataFragment{start, end - start})
			data += end - start
		}
		if len(fragments) > sparseMost {
			fragments = nil
			data = st.Size
			break
		}
		at = end
	}
	if st.Size-data-int64(len(fragments))*32 < sparseSave {
		_, err := unix.Seek(fd, 0, unix.SEEK_SET)
		return nil, err
	}
	if n := len(fragments); n == 0 || fragments[n-1].offset+fragments[n-1].length < st.Size {
		// GNU tar learns the length of a hole at the end from an empty fragment.
		fragments = append(fragments, dataFragment{offset: st.Size})
	}
	return fragments, nil
}

// formatFragments returns GNU's map for format 1.0 (a count, then offset and length of each
// fragment, a decimal a line, padded to a block) and the length of the data. A map of more than 1 MiB is nil: Go's
// archive/tar, and so Docker, takes none.
func formatFragments(fragments []dataFragment) (text []byte, data int64) {
	text = append(strconv.AppendInt(nil, int64(len(fragments)), 10), '\n')
	for _, f := range fragments {
		text = append(strconv.AppendInt(text, f.offset, 10), '\n')
		text = append(strconv.AppendInt(text, f.length, 10), '\n')
		data += f.length
	}
	if len(text) > maxMeta {
		return nil, 0
	}
	return append(text, zeros[:padding(int64(len(text)))]...), data
}
