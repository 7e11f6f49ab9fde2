package linkid

import (
	"strings"
	"testing"
)

// alphabet is that of RFC 4648, section 6.
const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"

func TestNew(t *testing.T) {
	const n = 10000
	seen := make(map[string]bool, n)
	last := make(map[byte]bool)
	for range n {
		id, err := New()
		if err != nil {
			t.Fatal(err)
		}
		if !Valid(id) {
			t.Fatalf("New() = %q, which is not valid", id)
		}
		if seen[id] {
			t.Fatalf("New() gave %q twice", id)
		}
		seen[id] = true
		last[id[Length-1]] = true
	}
	if len(last) != len(alphabet) {
		t.Errorf("the last character took %d of %d values: not all bits are random", len(last), len(alphabet))
	}
}

func TestValid(t *testing.T) {
	const good = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
	tests := []struct {
		id   string
		want bool
	}{
		{good, true},
		{"23456723456723456723456723", true},
		{"6Y5IM2XC7TSNIJZZFLJCS6I4I4", true}, // from Docker's documentation
		{"", false},
		{good[:25], false},
		{good + "A", false},
		{strings.ToLower(good), false},
		{good[:25] + "0", false},
		{good[:25] + "1", false},
		{good[:25] + "8", false},
		{good[:25] + "=", false},
		{good[:25] + "\n", false},
		{good[:25] + "/", false},
		{good[:25] + ".", false},
		{good[:25] + ":", false},
		{good[:25] + "\x00", false},
		{"../" + good[:23], false},
		{good[:24] + "\u00c4", false},
	}
	for _, tt := range tests {
		if got := Valid(tt.id); got != tt.want {
			t.Errorf("Valid(%q) = %v, want %v", tt.id, got, tt.want)
		}
	}
}

func TestAlphabet(t *testing.T) {
	for c := range 256 {
		s := strings.Repeat(string([]byte{byte(c)}), Length)
		if got, want := Valid(s), strings.IndexByte(alphabet, byte(c)) >= 0; got != want {
			t.Errorf("Valid of %d times %q = %v, want %v", Length, byte(c), got, want)
		}
	}
}

func BenchmarkNew(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		if _, err := New(); err != nil {
			b.Fatal(err)
		}
	}
}
