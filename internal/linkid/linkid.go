// Package linkid makes the short names of layers, the entries of a home's directory l:
// as short as they are, 128 of them fit into the page of mount data that mount(2) takes.
//
// The form is Docker's, which fixes it for good: a home holds names of both makers.
package linkid

import (
	"crypto/rand"
	"encoding/base32"
	"fmt"
)

// Length is the number of characters of an id.
const Length = 26

// entropy is how many random bytes are read: 26 characters of base32 hold 130 bits, of
// which whole bytes give 128 and zero bits fill up the last character. 17 bytes cover
// all 130.
const entropy = 17

// New returns a new id: 26 characters of A-Z and 2-7 made from the system's random
// source. Two homes never share one in practice; the caller still makes the link with
// O_EXCL semantics, so that even a collision harms nobody.
func New() (string, error) {
	var buf [entropy]byte
	if _, err := rand.Read(buf[:]); err != nil {
		return "", fmt.Errorf("read random bytes for a link: %w", err)
	}
	return base32.StdEncoding.EncodeToString(buf[:])[:Length], nil
}

// Valid reports whether s has the form of an id. What passes is one path element,
// holds no separator of any mount option, and is never "." or "..".
func Valid(s string) bool {
	if len(s) != Length {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if (c < 'A' || c > 'Z') && (c < '2' || c > '7') {
			return false
		}
	}
	return true
}
