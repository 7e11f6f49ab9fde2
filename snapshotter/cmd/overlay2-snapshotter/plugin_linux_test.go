package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

// runEnv makes the test program be the plugin.
const runEnv = "OVERLAY2_TEST_SNAPSHOTTER"

func TestMain(m *testing.M) {
	if os.Getenv(runEnv) != "" {
		os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
	}
	os.Exit(m.Run())
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// plugin is a process that serves.
type plugin struct {
	root, address string
	cmd           *exec.Cmd
	done          chan struct{}
	conn          *grpc.ClientConn
	snapshots.Snapshotter

	mu  sync.Mutex
	log bytes.Buffer
}

// Write takes the log.
func (p *plugin) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.Write(b)
}

func (p *plugin) logged() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.String()
}

func command(args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), runEnv+"=1")
	return cmd
}

// start starts a plugin and waits until it serves.
func start(t testing.TB, dir string, args ...string) *plugin {
	t.Helper()
	overlaytest.Require(t, "root")
	p := &plugin{root: filepath.Join(dir, "root"), address: filepath.Join(dir, "sock", "s.sock"), done: make(chan struct{})}
	p.cmd = command(append([]string{"--root", p.root, "--address", p.address, "--log-level", "debug"}, args...)...)
	p.cmd.Stderr = p
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // the plugin dies with the thread that has started it
		started <- p.cmd.Start()
		_ = p.cmd.Wait()
		close(p.done)
	}()
	must(t, <-started)
	t.Cleanup(func() {
		if p.conn != nil {
			_ = p.conn.Close()
		}
		_ = p.cmd.Process.Kill()
		<-p.done
	})
	var err error
	p.conn, err = grpc.NewClient("unix://"+p.address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	p.Snapshotter = proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(p.conn), "overlay2")
	for {
		select {
		case <-p.done:
			t.Fatalf("the plugin has ended: %s", p.logged())
		case <-time.After(10 * time.Millisecond):
		}
		if strings.Contains(p.logged(), "msg=serving ") {
			return p
		}
	}
}

// stop ends the plugin gracefully.
func (p *plugin) stop(t testing.TB) {
	t.Helper()
	must(t, p.cmd.Process.Signal(syscall.SIGTERM))
	<-p.done
	if code := p.cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("exit code %d: %s", code, p.logged())
	}
	if _, err := os.Lstat(p.address); err == nil {
		t.Error("the socket is still there")
	}
}

// TestSuite is containerd's own suite over the socket, by containerd's proxy.
func TestSuite(t *testing.T) {
	overlaytest.Require(t, "root")
	testsuite.SnapshotterSuite(t, "overlayfs", func(_ context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		dir, err := os.MkdirTemp("", "plugin-")
		if err != nil {
			return nil, nil, err
		}
		must(t, os.Symlink(root, filepath.Join(dir, "root")))
		p := start(t, dir)
		return p.Snapshotter, func() error {
			p.stop(t)
			return os.RemoveAll(dir)
		}, nil
	})
}

// TestErrorsOverTheSocket: containerd must know errors by their kind.
func TestErrorsOverTheSocket(t *testing.T) {
	ctx := context.Background()
	p := start(t, t.TempDir())
	_, err := p.Prepare(ctx, "a", "none")
	if !errdefs.IsNotFound(err) {
		t.Errorf("no such parent: %v", err)
	}
	_, err = p.Prepare(ctx, "a", "")
	must(t, err)
	_, err = p.Prepare(ctx, "a", "")
	if !errdefs.IsAlreadyExists(err) {
		t.Errorf("twice: %v", err)
	}
	_, err = p.Prepare(ctx, "b", "", snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotMaxSize: "lots"}))
	if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), snapshots.LabelSnapshotMaxSize) {
		t.Errorf("size: %v", err)
	}
	must(t, p.Commit(ctx, "c", "a"))
	_, err = p.View(ctx, "v", "c")
	must(t, err)
	if err := p.Remove(ctx, "c"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a parent: %v", err)
	}
	must(t, p.Remove(ctx, "v"))
	must(t, p.Remove(ctx, "c"))
	must(t, p.Snapshotter.(snapshots.Cleaner).Cleanup(ctx))
	if err := p.conn.Invoke(ctx, "/containerd.services.snapshots.v1.Snapshots/FromTheFuture", &snapshotsapi.CleanupRequest{}, &snapshotsapi.UsageResponse{}); status.Code(err) != codes.Unimplemented {
		t.Errorf("a method of a newer containerd: %v", err)
	}
	h, err := grpc_health_v1.NewHealthClient(p.conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
	if err != nil || h.GetStatus() != grpc_health_v1.HealthCheckResponse_SERVING {
		t.Errorf("health: %v, %v", h, err)
	}
	p.stop(t)
}

// TestGracefulStop: SIGTERM lets calls end, tells systemd, and removes the socket, which only root could use.
func TestGracefulStop(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	must(t, err)
	defer l.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	p := start(t, dir)
	said := func() string {
		b := make([]byte, 100)
		must(t, l.SetReadDeadline(time.Now().Add(time.Minute)))
		n, err := l.Read(b)
		must(t, err)
		return string(b[:n])
	}
	if got := said(); got != "READY=1" {
		t.Errorf("systemd is told %q", got)
	}
	st, err := os.Stat(p.address)
	must(t, err)
	if st.Mode().Perm() != 0o600 {
		t.Errorf("mode of the socket is %v", st.Mode())
	}
	_, err = p.Prepare(context.Background(), "a", "")
	must(t, err)
	p.stop(t)
	if got := said(); got != "STOPPING=1" {
		t.Errorf("systemd is told %q", got)
	}
	again := start(t, dir)
	_, err = again.Mounts(context.Background(), "a")
	must(t, err)
	again.stop(t)
}

// TestMetrics: calls and snapshots are counted.
func TestMetrics(t *testing.T) {
	ctx := context.Background()
	p := start(t, t.TempDir(), "--metrics-address", "127.0.0.1:0")
	_, err := p.Prepare(ctx, "a", "")
	must(t, err)
	_, err = p.Stat(ctx, "none")
	if !errdefs.IsNotFound(err) {
		t.Fatal(err)
	}
	address := regexp.MustCompile(`serving metrics" address=(\S+)`).FindStringSubmatch(p.logged())
	if address == nil {
		t.Fatal(p.logged())
	}
	for path, wants := range map[string][]string{
		"/healthz": {"ok"},
		"/metrics": {
			`overlay2_snapshotter_calls_total{code="OK",method="Prepare"} 1`, `overlay2_snapshotter_calls_total{code="NotFound",method="Stat"} 1`,
			`overlay2_snapshotter_snapshots{kind="active"} 1`, `overlay2_snapshotter_snapshots{kind="view"} 0`, `overlay2_snapshotter_call_duration_seconds_count{method="Prepare"} 1`,
			`overlay2_snapshotter_build_info{version=`, "go_goroutines ", "process_open_fds ",
		},
	} {
		resp, err := http.Get("http://" + address[1] + path)
		must(t, err)
		body, err := io.ReadAll(resp.Body)
		must(t, errors.Join(err, resp.Body.Close()))
		for _, want := range wants {
			if !strings.Contains(string(body), want) {
				t.Errorf("%s lacks %s:\n%s", path, want, body)
			}
		}
	}
	if !strings.Contains(p.logged(), "msg=call method=Prepare took=") || !strings.Contains(p.logged(), "key=a") {
		t.Errorf("log: %s", p.logged())
	}
	p.stop(t)
}

// TestDoesNotStart: a clear error, by exit code and log, for each thing that is wrong.
func TestDoesNotStart(t *testing.T) {
	overlaytest.Require(t, "root")
	ctx := context.Background()
	used := t.TempDir()
	p := start(t, used)
	_, err := p.Prepare(ctx, "a", "")
	must(t, err)
	plain := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(plain, nil, 0o600))
	for name, c := range map[string]struct {
		args []string
		code int
		text string
	}{
		"root in use":      {[]string{"--root", p.root, "--address", used + "/other"}, 1, fmt.Sprintf("root is in use by process %d", p.cmd.Process.Pid)},
		"socket in use":    {[]string{"--address", p.address}, 1, "another process listens on it"},
		"not a socket":     {[]string{"--address", plain}, 1, "not a socket"},
		"relative socket":  {[]string{"--address", "s.sock"}, 1, "not an absolute path"},
		"long socket":      {[]string{"--address", "/" + strings.Repeat("s", 108)}, 1, "107 bytes"},
		"below a file":     {[]string{"--address", plain + "/s.sock"}, 1, "not a directory"},
		"root is a file":   {[]string{"--root", plain, "--address", used + "/other"}, 1, plain},
		"root on /proc":    {[]string{"--root", "/proc/overlay2", "--address", used + "/other"}, 1, "/proc/overlay2"},
		"metrics in use":   {[]string{"--address", used + "/other", "--metrics-address", "256.0.0.1:1"}, 1, "metrics address"},
		"unknown flag":     {[]string{"--nonsense"}, 2, "nonsense"},
		"bad durability":   {[]string{"--durability", "most"}, 2, "not background, strict or off"},
		"bad log level":    {[]string{"--log-level", "loud"}, 2, "loud"},
		"argument":         {[]string{"start"}, 2, `"start"`},
		"volatile":         {[]string{"--mount-option", "volatile", "--address", used + "/other"}, 1, "volatile"},
		"bad mount option": {[]string{"--mount-option", "lowerdir=/", "--address", used + "/other"}, 1, "lowerdir"},
	} {
		t.Run(name, func(t *testing.T) {
			args := c.args
			if !slices.Contains(args, "--root") && c.code == 1 {
				args = append([]string{"--root", filepath.Join(t.TempDir(), "root")}, args...)
			}
			cmd := command(args...)
			out, _ := cmd.CombinedOutput()
			if code := cmd.ProcessState.ExitCode(); code != c.code || !strings.Contains(string(out), c.text) {
				t.Errorf("exit code %d, want %d and %q: %s", code, c.code, c.text, out)
			}
		})
	}
	// The one that serves has not noticed.
	_, err = p.Mounts(ctx, "a")
	must(t, err)
	p.stop(t)
	must(t, os.WriteFile(filepath.Join(p.root, "format"), []byte("2\n"), 0o600))
	cmd := command("--root", p.root, "--address", p.address)
	if out, _ := cmd.CombinedOutput(); cmd.ProcessState.ExitCode() != 1 || !strings.Contains(string(out), "unknown format") {
		t.Errorf("a root of a newer version: %s", out)
	}
	must(t, os.WriteFile(filepath.Join(p.root, "format"), []byte("1\n"), 0o600))
	must(t, os.WriteFile(filepath.Join(p.root, "metadata.db"), bytes.Repeat([]byte("x"), 65536), 0o600))
	cmd = command("--root", p.root, "--address", p.address)
	if out, _ := cmd.CombinedOutput(); cmd.ProcessState.ExitCode() != 1 || !strings.Contains(string(out), "metadata is corrupt") {
		t.Errorf("a damaged store: %s", out)
	}
	cmd = command("--version")
	if out, err := cmd.CombinedOutput(); err != nil || !strings.HasPrefix(string(out), "overlay2-snapshotter ") {
		t.Errorf("version: %s, %v", out, err)
	}
}

// write mounts a snapshot and calls f with the path.
func write(mounts []mount.Mount, f func(dir string) error) error {
	return mount.WithTempMount(context.Background(), mounts, f)
}
