package blockdev

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// A building is a machine with a device on which others stand. It has no /dev but what nodes says.
type building struct {
	t     *testing.T
	k     *nbdnltest.Kernel
	d     *Device
	nodes map[string]string // the numbers of those in /dev
	fail  map[string]error  // of syncs, by name in /dev
	enter func(node string) // called when one is opened, which counts afterwards
	log   []string          // the nodes that were synced
}

// standing is an open device of a building.
type standing struct {
	b    *building
	node string
}

func (s standing) Close() error { return nil }

func (s standing) Sync() error {
	s.b.log = append(s.b.log, s.node)
	return s.b.fail[s.node]
}

func newBuilding(t *testing.T) *building {
	k, m, o := lab(t)
	b := &building{t: t, k: k, nodes: map[string]string{"nbd0": "43:0"}, fail: make(map[string]error)}
	system := k.System()
	// What package nbdnl opens, the fake kernel has.
	m.system.DeviceNumber = func(path string) (string, bool) {
		number, ok := b.nodes[strings.TrimPrefix(path, k.Path("dev")+"/")]
		return number, ok
	}
	m.system.Open = func(path string, flag int) (nbdnl.Device, error) {
		node := strings.TrimPrefix(path, "/dev/")
		if b.enter != nil {
			b.enter(node)
		}
		if _, ok := b.nodes[node]; !ok {
			return nil, &os.PathError{Op: "open", Path: path, Err: syscall.ENOENT}
		}
		if node == "nbd0" { // so that the index is held
			dev, err := system.Open(k.Path("dev/nbd0"), flag)
			if err != nil {
				return nil, err
			}
			t.Cleanup(func() { dev.Close() })
		}
		return standing{b, node}, nil
	}
	d, err := m.connect(t.Context(), 0, newStore(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	b.d = d
	return b
}

func (b *building) write(path, content string) {
	b.t.Helper()
	path = b.k.Path(path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		b.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content+"\n"), 0o644); err != nil {
		b.t.Fatal(err)
	}
}

// add makes a device with a node, whose directory is below /sys/block.
func (b *building) add(dir, number string) {
	b.t.Helper()
	b.write(filepath.Join("sys/block", dir, "dev"), number)
	b.nodes[filepath.Base(dir)] = number
}

// put makes a device stand on one, whose directory is below /sys/block, too.
func (b *building) put(above, dir string) {
	b.t.Helper()
	link := b.k.Path(filepath.Join("sys/block", dir, "holders", above))
	if err := errors.Join(os.MkdirAll(filepath.Dir(link), 0o755), os.Symlink("../"+above, link)); err != nil {
		b.t.Fatal(err)
	}
}

func (b *building) remove(path string) {
	if err := os.RemoveAll(b.k.Path(path)); err != nil {
		b.t.Error(err)
	}
}

// tall makes a volume of a partition, an array of that and of the other partition, a partition of
// the array, and a loop device of the volume.
func tall(t *testing.T) *building {
	b := newBuilding(t)
	for n := 1; n <= 2; n++ {
		b.k.Partition(0, n)
		b.nodes[fmt.Sprintf("nbd0p%d", n)] = fmt.Sprintf("43:%d", n)
	}
	b.add("dm-0", "254:0")
	b.put("dm-0", "nbd0/nbd0p1")
	b.add("md0", "9:0")
	b.put("md0", "dm-0")
	b.put("md0", "nbd0/nbd0p2")
	b.add("md0/md0p1", "259:0")
	b.add("loop3", "7:3")
	b.write("sys/block/loop3/loop/backing_file", "/dev/dm-0")
	b.add("loop4", "7:4")
	b.write("sys/block/loop4/loop/backing_file", "/var/image")
	b.add("dm-1", "254:1") // stands elsewhere
	return b
}

// TestFlushStack holds that everything is synced once that stands on a device, and nothing before
// what stands on it.
func TestFlushStack(t *testing.T) {
	b := tall(t)
	want := []string{"md0p1", "md0", "loop3", "dm-0", "nbd0p1", "nbd0p2", "nbd0"}
	if err := b.d.Flush(t.Context()); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff(want, b.log); diff != "" {
		t.Errorf("synced (-want +got):\n%s", diff)
	}

	// Without udev, volumes have no node but this.
	delete(b.nodes, "dm-0")
	b.write("sys/block/dm-0/dm/name", "group-volume")
	b.nodes["mapper/group-volume"] = "254:0"
	b.write("sys/block/loop3/loop/backing_file", "/dev/mapper/group-volume")
	b.log = nil
	if err := b.d.Flush(t.Context()); err != nil {
		t.Error(err)
	}
	want[3] = "mapper/group-volume"
	if diff := cmp.Diff(want, b.log); diff != "" {
		t.Errorf("synced by another name (-want +got):\n%s", diff)
	}

	// What fails is named, and keeps nobody else from being synced.
	b.fail["md0"] = syscall.EIO
	b.log = nil
	if err := b.d.Flush(t.Context()); !errors.Is(err, syscall.EIO) || len(b.log) != len(want) {
		t.Errorf("error %v, synced %v", err, b.log)
	}
}

// TestFlushVanishes removes things at the moment at which they are to be synced: that is no error.
func TestFlushVanishes(t *testing.T) {
	for node, marks := range map[string][]string{
		"md0":    {"sys/block/md0", "sys/block/dm-0/holders/md0", "sys/block/nbd0/nbd0p2/holders/md0"},
		"loop3":  {"sys/block/loop3/loop"},
		"nbd0p2": {"sys/block/nbd0/nbd0p2"},
	} {
		for _, with := range []string{"its node", "another's node"} {
			b := tall(t)
			b.enter = func(opened string) {
				if opened != node {
					return
				}
				for _, m := range marks {
					b.remove(m)
				}
				if with == "its node" {
					delete(b.nodes, node)
				}
			}
			err := b.d.Flush(t.Context())
			if err != nil || slices.Contains(b.log, node) || !slices.Contains(b.log, "nbd0") {
				t.Errorf("%s goes with %s: error %v, synced %v", node, with, err, b.log)
			}
		}
	}
}

// TestFlushNoNode holds that what can't be reached is an error that names it.
func TestFlushNoNode(t *testing.T) {
	for _, node := range []string{"nbd0p1", "dm-0", "nbd0"} {
		for _, number := range []string{"", "8:0"} {
			b := tall(t)
			if b.nodes[node] = number; number == "" {
				delete(b.nodes, node)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond) // shorter than a node is waited for
			_, err := b.d.machine.flush(ctx, 0, b.d.incarnation)
			cancel()
			if !errors.Is(err, os.ErrNotExist) || !strings.Contains(fmt.Sprint(err), "/dev/"+node+",") ||
				slices.Contains(b.log, node) {
				t.Errorf("%s is %q: error %v, synced %v", node, number, err, b.log)
			}
			delete(b.nodes, node)
		}
	}
	// A node that is about to be made is waited for.
	b := tall(t)
	looks := 0
	numbers := b.d.machine.system.DeviceNumber
	b.d.machine.system.DeviceNumber = func(path string) (string, bool) {
		if filepath.Base(path) == "nbd0p1" {
			if looks++; looks < 3 {
				return "", false
			}
		}
		return numbers(path)
	}
	if err := b.d.Flush(t.Context()); err != nil || !slices.Contains(b.log, "nbd0p1") {
		t.Errorf("error %v, synced %v, want the partition whose node comes late", err, b.log)
	}
}

// TestFlushAnother holds that a device that has got the index meanwhile is not touched, and nothing
// is told of it.
func TestFlushAnother(t *testing.T) {
	b := tall(t)
	opened := 0
	b.enter = func(string) { opened++ }
	b.k.Replace(0)
	if err := b.d.Flush(t.Context()); !errors.Is(err, nbdnl.ErrNotConnected) || opened > 0 {
		t.Errorf("error %v, %d nodes opened", err, opened)
	}

	b = tall(t)
	b.enter = func(string) { b.k.Replace(0) }
	if err := b.d.Flush(t.Context()); !errors.Is(err, nbdnl.ErrNotConnected) || len(b.log) > 0 {
		t.Errorf("replaced at the open: error %v, synced %v", err, b.log)
	}

	b = tall(t)
	b.enter = func(node string) {
		if node == "nbd0p2" {
			b.k.Replace(0)
		}
	}
	if err := b.d.Flush(t.Context()); !errors.Is(err, nbdnl.ErrNotConnected) {
		t.Errorf("replaced in the midst: error %v", err)
	}
}

// TestFlushHiddenBtrfs holds that a btrfs that can't be reached is an error, and one that goes
// meanwhile is none.
func TestFlushHiddenBtrfs(t *testing.T) {
	b := tall(t)
	b.write("sys/fs/btrfs/5ca1ab1e/devices/md0p1/dev", "259:0")
	b.write("sys/fs/btrfs/decade/devices/sda/dev", "8:0")
	b.write("proc/self/mountinfo", "60 1 0:52 / /mnt rw shared:1 - btrfs /dev/sda rw\n"+
		"61 1 259:0 / /srv rw - ext4 /dev/md0p1 rw")
	err := b.d.Flush(t.Context())
	if err == nil || !strings.Contains(err.Error(), "5ca1ab1e") || !slices.Contains(b.log, "nbd0") {
		t.Errorf("error %v, synced %v", err, b.log)
	}
	numbers := b.d.machine.system.DeviceNumber
	b.write("proc/self/mountinfo", "60 1 0:52 / /mnt rw shared:1 - btrfs /dev/elsewhere rw")
	b.d.machine.system.DeviceNumber = func(path string) (string, bool) {
		if filepath.Base(path) == "elsewhere" {
			b.remove("sys/fs/btrfs/5ca1ab1e")
		}
		return numbers(path)
	}
	if err := b.d.Flush(t.Context()); err != nil {
		t.Errorf("it was unmounted meanwhile: %v", err)
	}
}
