//go:build linux

// Command overlay2-snapshotter serves a snapshotter on a unix socket, as a proxy plugin of containerd.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"github.com/bcc2decd/overlay2"
	"github.com/bcc2decd/overlay2/snapshotter"
)

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

// config is what the flags say.
type config struct {
	root, address, metrics string
	stopTimeout            time.Duration
	level                  slog.Level
	json, version          bool
	options                snapshotter.Options
}

// run returns the exit code: 0 after a graceful stop, 1 if it cannot go on, 2 for wrong flags.
func run(args []string, stdout, stderr io.Writer) int {
	c, err := parseFlags(args, stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		return 2 // the flag package has said why
	case c.version:
		fmt.Fprintln(stdout, "overlay2-snapshotter", version())
		return 0
	}
	var handler slog.Handler = slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: c.level})
	if c.json {
		handler = slog.NewJSONHandler(stderr, &slog.HandlerOptions{Level: c.level})
	}
	log := slog.New(handler)
	c.options.Log = log
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := serve(ctx, c, log); err != nil {
		log.Error("stopped", "error", err)
		return 1
	}
	log.Info("stopped")
	return 0
}

func parseFlags(args []string, stderr io.Writer) (c config, err error) {
	f := flag.NewFlagSet("overlay2-snapshotter", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&c.root, "root", "/var/lib/overlay2-snapshotter", "`directory` of layers and metadata")
	f.StringVar(&c.address, "address", "/run/overlay2-snapshotter/overlay2-snapshotter.sock", "unix `socket` to serve on")
	f.StringVar(&c.metrics, "metrics-address", "", "`host:port` for Prometheus metrics and /healthz; none if empty")
	f.TextVar(&c.level, "log-level", slog.LevelInfo, "debug, info, warn or error")
	f.BoolVar(&c.json, "log-json", false, "log in JSON")
	f.DurationVar(&c.stopTimeout, "stop-timeout", 10*time.Second, "how long calls may take to end after SIGTERM")
	f.BoolVar(&c.options.RemapIDs, "remap-ids", false, "give containerd idmapped mounts; needs the capability remap-ids in its configuration")
	f.BoolVar(&c.version, "version", false, "print the version")
	f.Func("durability", "what a power cut may take: background (active snapshots, the default), strict or off", func(s string) error {
		for _, d := range []overlay2.Durability{overlay2.DurabilityBackground, overlay2.DurabilityStrict, overlay2.DurabilityOff} {
			if d.String() == s {
				c.options.Durability = d
				return nil
			}
		}
		return errors.New("not background, strict or off")
	})
	f.Func("mount-option", "overlay mount `option` such as metacopy=on; may be repeated", func(s string) error {
		c.options.MountOptions = append(c.options.MountOptions, s)
		return nil
	})
	if err := f.Parse(args); err != nil {
		return c, err
	}
	if f.NArg() > 0 {
		err := fmt.Errorf("unexpected argument %q", f.Arg(0))
		fmt.Fprintln(stderr, err)
		return c, err
	}
	c.address = strings.TrimPrefix(c.address, "unix://")
	return c, nil
}

// version returns that of the module, or the commit that it was built from.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	v := info.Main.Version
	if v == "" || v == "(devel)" {
		v = "devel"
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				v += "-" + s.Value
			}
		}
	}
	return v
}
