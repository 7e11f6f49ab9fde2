//go:build linux

package overlay2

import (
	"errors"
	"slices"
	"strings"

	"github.com/bcc2decd/overlay2/internal/sys"
	"github.com/opencontainers/selinux/go-selinux/label"
	"golang.org/x/sys/unix"
)

// mountSpec is an overlay mount as a value. Its names are relative to home and need no
// escaping there: links are base32, and upper and work are reached through a link.
type mountSpec struct {
	home    string
	dir     string   // before each of lowers: "l/"
	lowers  []string // nearest first
	upper   string   // empty for a read-only mount
	work    string
	options []string
	label   string
	// lower is the content of the lower file, if the chain may be remembered as a readyChain.
	lower string
	// ready, if set, is how the lower layers were mounted before, and said the whole option string then.
	ready *readyChain
	said  sys.Name
	// held, if set, are names for lowers that take no walk; see chain.held.
	held []string
	// chain are the layers, that of upper first if there is one; its first is checked. Nil if
	// the names are no links, or if ready is set.
	chain *chain
}

// data returns the option string of mount(2), each name after prefix, which is either
// empty (relative names) or home with a slash.
func (s mountSpec) data(prefix string) string {
	return s.withRest("lowerdir="+s.lowerdir(prefix), prefix)
}

// lowerdir returns the value of that option.
func (s mountSpec) lowerdir(prefix string) string {
	prefix = escapeMountName(prefix)
	var b strings.Builder
	b.Grow(len(s.lowers) * (len(prefix) + linkRoom))
	for i, lower := range s.lowers {
		if i > 0 {
			b.WriteByte(':')
		}
		if s.held != nil {
			b.WriteString(s.held[i])
			continue
		}
		b.WriteString(prefix)
		b.WriteString(s.dir)
		b.WriteString(lower)
	}
	return b.String()
}

// withRest adds all other options to that of lowerdir.
func (s mountSpec) withRest(lowerdir, prefix string) string {
	prefix = escapeMountName(prefix)
	parts := make([]string, 0, 3+2*len(s.options))
	parts = append(parts, lowerdir)
	if s.upper != "" {
		parts = append(parts, ",upperdir="+prefix+s.upper, ",workdir="+prefix+s.work)
	}
	for _, o := range s.options {
		parts = append(parts, ",", o)
	}
	return label.FormatMountLabel(strings.Join(parts, ""), s.label)
}

// fitting returns data(prefix), and whether that is no more than room bytes.
func (s mountSpec) fitting(prefix string, room int) (data string, ok bool) {
	if s.held == nil && len(s.lowers)*(len(prefix)+1) > room {
		return "", false
	}
	data = s.data(prefix)
	return data, len(data) <= room
}

// check checks a lower layer.
func (s mountSpec) check(i int) error {
	if s.chain == nil {
		return nil
	}
	if s.upper != "" {
		i++
	}
	return s.chain.check(i)
}

// checkAll checks all of them.
func (s mountSpec) checkAll() error {
	if s.chain == nil || s.chain.checked {
		return nil
	}
	for i := range s.lowers {
		if err := s.check(i); err != nil {
			return err
		}
	}
	s.chain.checked = true
	return nil
}

// hold lets the lower layers, which are checked, be named by open directories, if the chain has all of them: prefix
// stands before the number of each descriptor.
func (s *mountSpec) hold(prefix string) bool {
	if s.chain == nil {
		return false
	}
	s.held = s.chain.held(len(s.chain.links)-len(s.lowers), prefix)
	return s.held != nil
}

// dirs puts the directories that the links lead to in their place.
func (s *mountSpec) dirs() {
	s.lowers = slices.Clone(s.lowers)
	if s.chain == nil {
		return
	}
	known := s.chain.known
	if s.upper != "" {
		s.upper, s.work = known[0].id+"/"+diffName, known[0].id+"/"+workName
		known = known[1:]
	}
	s.dir = ""
	for i, k := range known {
		s.lowers[i] = k.id + "/" + diffName
	}
}

// mountNameEscaper puts a backslash before what separates options and layers
// (ovl_next_opt and ovl_split_lowerdirs of fs/overlayfs; the same for upperdir).
var mountNameEscaper = strings.NewReplacer(`\`, `\\`, `,`, `\,`, `:`, `\:`)

func escapeMountName(s string) string { return mountNameEscaper.Replace(s) }

// unmountGone detaches the mount at path. That nothing is mounted there is no error.
func unmountGone(path string) error {
	err := sys.Unmount(path)
	if isGone(err) {
		return nil
	}
	return err
}

// isGone reports whether an unmount says that nothing is mounted there.
func isGone(err error) bool { return errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) }
