package overlay2

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// benchDepths are numbers of lower layers.
var benchDepths = []int{1, 16, 64, 127, 500}

// BenchmarkGetPut measures Get and Put of layers with more or fewer ancestors beside the same
// mounts made by hand, turn by turn, as the load of a machine changes within a run.
// It reports the medians in microseconds, and the ratio of Get and Put to the quickest of the
// others, each of which is nothing but one mount and one unmount of names known beforehand.
func BenchmarkGetPut(b *testing.B) {
	overlaytest.Require(b, "root", "overlay")
	d, err := New(overlaytest.MountFS(b, overlaytest.FS{Name: "tmpfs"}), Options{})
	must(b, err)
	deepChain(b, d, slices.Max(benchDepths))
	for _, depth := range benchDepths {
		id := fmt.Sprintf("box%d", depth)
		must(b, d.CreateReadWrite(id, fmt.Sprintf("layer%d", depth-1), nil))
		for range 4 { // until the layer is kept
			time.Sleep(2 * settleTime)
			_, err := d.Get(id, "")
			must(b, err)
			must(b, d.Put(id))
		}
		b.Run(sizeName(depth), func(b *testing.B) { benchGetPut(b, d, id) })
	}
}

// rawMount is one way to mount by hand.
type rawMount struct {
	name  string
	mount func() error
}

// rawMounts are those that can mount the layer.
func rawMounts(b *testing.B, d *Driver, id, target string) []rawMount {
	l, err := openLayer(d.home, id)
	must(b, err)
	defer l.close()
	links, err := l.lowers()
	must(b, err)
	spec, err := d.mountSpec(l, links, false)
	must(b, err)
	must(b, spec.checkAll())
	held, numbers := spec, spec
	heldOK := held.hold(sys.ProcFDs) && numbers.hold("")
	b.Cleanup(spec.chain.close)
	spec.chain = nil // nothing is checked
	var raw []rawMount
	if data, ok := held.fitting(d.home+"/", sys.MaxMountData()); ok && heldOK {
		raw = append(raw, rawMount{"held", func() error { return unix.Mount("overlay", target, "overlay", 0, data) }})
	}
	if data, ok := spec.fitting(d.home+"/", sys.MaxMountData()); ok {
		raw = append(raw, rawMount{"legacy", func() error { return unix.Mount("overlay", target, "overlay", 0, data) }})
	}
	if data, ok := spec.fitting("", sys.MaxMountData()); ok {
		raw = append(raw, rawMount{"relative", func() error { return sys.MountOverlayFrom(d.home, target, data, 0) }})
	}
	if data, ok := numbers.fitting(d.home+"/", sys.MaxMountData()); ok && heldOK {
		raw = append(raw, rawMount{"numbers", func() error { return sys.MountOverlayFrom(sys.ProcFDs, target, data, 0) }})
	}
	if d.facts.newAPI == yes {
		raw = append(raw, rawMount{"newapi", func() error {
			fd, err := spec.detached(0)
			if err == nil {
				err = sys.MoveMount(fd, target)
				must(b, sys.Close(fd))
			}
			return err
		}})
	}
	return raw
}

func benchGetPut(b *testing.B, d *Driver, id string) {
	target := d.home + "/raw"
	must(b, os.Mkdir(target, 0o700))
	defer func() { must(b, os.Remove(target)) }()
	ways := rawMounts(b, d, id, target)
	times := make([][]time.Duration, len(ways)+1)
	turns := make([]func() time.Duration, 0, len(times))
	for _, way := range ways {
		turns = append(turns, func() time.Duration {
			return inUse(b, way.mount, func() error { return unix.Unmount(target, unix.MNT_DETACH) })
		})
	}
	turns = append(turns, func() time.Duration {
		return inUse(b, func() error { return errOf2(d.Get(id, "")) }, func() error { return d.Put(id) })
	})
	for b.Loop() {
		for _, i := range rand.Perm(len(turns)) { // as what each leaves to the kernel is done in the turn of another
			times[i] = append(times[i], turns[i]())
		}
	}
	floor := time.Duration(1 << 62)
	for i, way := range ways {
		m := median(times[i])
		b.ReportMetric(float64(m.Nanoseconds())/1e3, strings.ReplaceAll(way.name, " ", "-")+"-us")
		floor = min(floor, m)
	}
	m := median(times[len(ways)])
	b.ReportMetric(float64(m.Nanoseconds())/1e3, "getput-us")
	b.ReportMetric(float64(m)/float64(floor), "x-floor")
	b.ReportMetric(0, "ns/op")
}

func median(times []time.Duration) time.Duration {
	slices.Sort(times)
	return times[len(times)/2]
}

// inUse returns how long both take, with time for a use in between. An unmount right after its mount is quicker than any in use,
// as the kernel's grace period (RCU) that it waits for is under way already.
func inUse(b *testing.B, mount, unmount func() error) time.Duration {
	pause := func() {
		for start := time.Now(); time.Since(start) < 200*time.Microsecond; {
		}
	}
	start := time.Now()
	must(b, mount())
	took := time.Since(start)
	pause()
	start = time.Now()
	must(b, unmount())
	took += time.Since(start)
	pause()
	return took
}
