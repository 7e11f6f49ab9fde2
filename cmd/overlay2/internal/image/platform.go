package image

import (
	"fmt"
	"runtime"
	"strings"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Platform is what an image runs on. The zero value is this machine.
type Platform struct{ OS, Arch, Variant string }

// ParsePlatform reads "linux/amd64", "linux/arm64/v8" or "arm64".
func ParsePlatform(s string) (Platform, error) {
	if s == "" {
		return Platform{}.orHost(), nil
	}
	parts := strings.Split(s, "/")
	for _, p := range parts {
		if p == "" {
			parts = nil
		}
	}
	switch len(parts) {
	case 1:
		return Platform{OS: "linux", Arch: parts[0]}, nil
	case 2:
		return Platform{OS: parts[0], Arch: parts[1]}, nil
	case 3:
		return Platform{OS: parts[0], Arch: parts[1], Variant: parts[2]}, nil
	}
	return Platform{}, fmt.Errorf("platform %q is not of the form os/arch[/variant]", s)
}

func (p Platform) orHost() Platform {
	if p.OS == "" {
		p = Platform{OS: "linux", Arch: runtime.GOARCH}
	}
	return p
}

// String returns os/arch[/variant].
func (p Platform) String() string {
	s := p.OS + "/" + p.Arch
	if p.Variant != "" {
		s += "/" + p.Variant
	}
	return s
}

// matches reports whether an image for have is what p asks for. A variant that only one
// side names is no hindrance.
func (p Platform) matches(have *v1.Platform) bool {
	p = p.orHost()
	return p.OS == have.OS && p.Arch == have.Architecture &&
		(p.Variant == "" || have.Variant == "" || p.Variant == have.Variant)
}
