package overlay2

import (
	"errors"
	"reflect"
	"strings"
	"testing"
)

func TestParseOptions(t *testing.T) {
	for _, c := range []struct {
		in   []string
		want Options
	}{
		{nil, Options{}},
		{[]string{"overlay2.size=10G"}, Options{Size: 10 << 30}},
		{[]string{" OVERLAY2.Size = 512m "}, Options{Size: 512 << 20}},
		{[]string{"overlay2.size=1", "overlay2.inodes=7"}, Options{Size: 1, Inodes: 7}},
		{[]string{"overlay2.size=none", "overlay2.inodes=none"}, Options{}},
		{[]string{"overlay2.override_kernel_check=true"}, Options{OverrideKernelCheck: true}},
		{[]string{"overlay2.override_kernel_check=0"}, Options{}},
		{[]string{"overlay2.record_digests=1"}, Options{RecordDigests: true}},
		{[]string{"overlay2.mountopt=metacopy=on,volatile"}, Options{MountOptions: []string{"metacopy=on", "volatile"}}},
	} {
		got, err := ParseOptions(c.in)
		if err != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("%q: %+v %v", c.in, got, err)
		}
	}
	for in, says := range map[string]string{
		"overlay2.size":                          "unable to parse",
		"":                                       "unable to parse",
		"overlay2.size=1X":                       "overlay2.size",
		"overlay2.size=-1":                       "overlay2.size",
		"overlay2.size=0":                        "more than 0",
		"overlay2.inodes=0":                      "more than 0",
		"overlay2.inodes=-1":                     "overlay2.inodes",
		"overlay2.inodes=1G":                     "overlay2.inodes",
		"overlay2.override_kernel_check=perhaps": "overlay2.override_kernel_check",
		"overlay2.record_digests=":               "overlay2.record_digests",
		"overlay.size=1":                         `"overlay.size"`,
		"size=1":                                 `"size"`,
		"overlay2.mountopt=lowerdir=/etc":        "lowerdir",
		"overlay2.mountopt=":                     "mount option",
	} {
		_, err := ParseOptions([]string{in})
		if !errors.Is(err, ErrInvalidOption) || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: %v", in, err)
		}
	}
}

func TestParseStorageOpt(t *testing.T) {
	defaults := limits{size: 5, inodes: 6}
	for _, c := range []struct {
		in   map[string]string
		want limits
	}{
		{nil, defaults},
		{map[string]string{}, defaults},
		{map[string]string{"SIZE": "1k"}, limits{1024, 6}},
		{map[string]string{"size": "2", "Inodes": "3"}, limits{2, 3}},
		{map[string]string{"size": "none"}, limits{0, 6}},
		{map[string]string{"size": " 7 ", "inodes": "none"}, limits{7, 0}},
	} {
		got, err := parseStorageOpt(&CreateOpts{StorageOpt: c.in}, defaults)
		if err != nil || got != c.want {
			t.Errorf("%q: %+v %v", c.in, got, err)
		}
	}
	for _, in := range []map[string]string{{"size": "0"}, {"size": "-1"}, {"size": "1X"}, {"size": ""}, {"inodes": "0"}, {"inodes": "x"}, {"quota": "1"}, {"size": "1", "SIZE": "2"}} {
		if got, err := parseStorageOpt(&CreateOpts{StorageOpt: in}, defaults); !errors.Is(err, ErrInvalidOption) {
			t.Errorf("%q: %+v %v", in, got, err)
		}
	}
}

func TestMountLabel(t *testing.T) {
	for _, ok := range []string{"", "system_u:object_r:container_file_t:s0:c1,c2", "u:r:t:s0-s0:c0.c1023"} {
		if err := checkMountLabel(ok); err != nil {
			t.Errorf("%q: %v", ok, err)
		}
	}
	for _, bad := range []string{`a",upperdir=/etc,x="`, "a b", "a\n", "a\x00", `a\`, "a=b", "a'", "\xff"} {
		if err := checkMountLabel(bad); !errors.Is(err, ErrInvalidOption) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func FuzzOptions(f *testing.F) {
	for _, s := range []string{"overlay2.size=10G", "overlay2.mountopt=xino=on", "=", "overlay2.inodes=18446744073709551616"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		o, err := ParseOptions([]string{s})
		if err != nil {
			if !errors.Is(err, ErrInvalidOption) {
				t.Errorf("error %v", err)
			}
			return
		}
		for _, m := range o.MountOptions {
			if strings.ContainsAny(m, ",\x00") || strings.Contains(m, "dir=/") {
				t.Errorf("mount option %q", m)
			}
		}
	})
}
