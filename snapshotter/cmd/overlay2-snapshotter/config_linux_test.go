package main

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	ctrdconfig "github.com/containerd/containerd/v2/cmd/containerd/server/config"
)

// TestConfig: containerd reads the snippets, and they name the socket and root that are the defaults of the flags.
func TestConfig(t *testing.T) {
	c, err := parseFlags(nil, os.Stderr)
	must(t, err)
	dir := filepath.Join("..", "..", "config")
	for name, capabilities := range map[string][]string{"containerd.toml": {"rebase"}, "containerd-1.toml": nil} {
		var got ctrdconfig.Config
		must(t, ctrdconfig.LoadConfig(context.Background(), filepath.Join(dir, name), &got))
		p := got.ProxyPlugins["overlay2"]
		if p.Type != "snapshot" || p.Address != c.address || !slices.Equal(p.Capabilities, capabilities) {
			t.Errorf("%s: %+v", name, p)
		}
		if root := p.Exports["root"]; root != c.root && len(capabilities) > 0 {
			t.Errorf("%s: root %q", name, root)
		}
	}
	for name, want := range map[string]string{
		"overlay2-snapshotter.service": "StateDirectory=" + strings.TrimPrefix(c.root, "/var/lib/"),
		"k3s-config-v3.toml.tmpl":      `address = "` + c.address + `"`,
	} {
		data, err := os.ReadFile(filepath.Join(dir, name))
		must(t, err)
		if !strings.Contains(string(data), want) {
			t.Errorf("%s lacks %s", name, want)
		}
	}
}
