package blockdev_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// output runs a command and returns what it prints.
func output(t *testing.T, name string, arg ...string) string {
	t.Helper()
	out, err := exec.Command(name, arg...).Output()
	if err != nil {
		t.Fatalf("%s %s: %v", name, strings.Join(arg, " "), err)
	}
	return strings.TrimSpace(string(out))
}

// mapped has the device mapper make a volume of the first sectors of a device, and returns its
// node.
func mapped(t *testing.T, name, below string, sectors int) string {
	t.Helper()
	_ = exec.Command("modprobe", "-C", "/dev/null", "-q", "dm-mod").Run() // It may be built in.
	command(t, "dmsetup", "create", "--noudevsync", name, "--table", fmt.Sprintf("0 %d linear %s 0", sectors, below))
	t.Cleanup(func() { command(t, "dmsetup", "remove", "--noudevsync", name) })
	command(t, "dmsetup", "mknodes", "--noudevsync", name)
	return "/dev/mapper/" + name
}

// looped makes a loop device of another device, and returns its node.
func looped(t *testing.T, below string) string {
	t.Helper()
	loop := output(t, "losetup", "--find", "--show", below)
	t.Cleanup(func() { command(t, "losetup", "--detach", loop) })
	return loop
}

// mounted makes a file system on a device and mounts it.
func mounted(t *testing.T, node string) string {
	t.Helper()
	command(t, "mkfs.ext4", "-q", "-O", "^has_journal", node)
	dir := t.TempDir()
	if err := unix.Mount(node, dir, "ext4", 0, ""); err != nil {
		t.Fatalf("mount %s: %v", node, err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", node, err)
		}
	})
	return dir
}

// TestKernelFlushStack writes what file systems keep back that stand on a volume of the device
// mapper, on a loop device, and on a loop device of a volume of a partition; and what is kept back
// of such a device without a file system.
func TestKernelFlushStack(t *testing.T) {
	nbdnltest.RequireKernel(t)
	for name, build := range map[string]func(t *testing.T, disk string) string{
		"volume":         func(t *testing.T, disk string) string { return mapped(t, "above", disk, 32768) },
		"loop":           looped,
		"volume of loop": func(t *testing.T, disk string) string { return mapped(t, "above", looped(t, disk), 32768) },
		"loop of volume of partition": func(t *testing.T, disk string) string {
			return looped(t, mapped(t, "above", disk+"p1", 32768))
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := partitioned(32 << 20)
			d := connect(t, b, blockdev.Options{})
			top := build(t, d.Path())

			f, err := os.OpenFile(top, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close() // The last close would write.
			raw := bytes.Repeat([]byte("cached of a device that stands above, "), 1000)
			if _, err := f.WriteAt(raw, 4096); err != nil {
				t.Fatal(err)
			}
			if b.has(raw) {
				t.Fatal("nothing is kept back: there is nothing to show")
			}
			if err := d.Flush(t.Context()); err != nil || !b.has(raw) {
				t.Errorf("error %v, or the backend has not got what was cached", err)
			}
			f.Close()

			dir := mounted(t, top)
			content := bytes.Repeat([]byte("cached by a file system above, "), 4000)
			if err := os.WriteFile(filepath.Join(dir, "file"), content, 0o600); err != nil {
				t.Fatal(err)
			}
			if b.has(content[:4096]) {
				t.Fatal("the file system keeps nothing back: there is nothing to show")
			}
			syncs := b.syncs.Load()
			if err := d.Flush(t.Context()); err != nil || b.syncs.Load() == syncs {
				t.Errorf("error %v, %d syncs", err, b.syncs.Load()-syncs)
			}
			if !b.has(content[:4096]) {
				t.Error("the backend has not got what the file system had cached")
			}
		})
	}
}

// TestKernelFlushNoNode takes the node of a partition away: what is cached of it can't be written,
// and Flush says so.
func TestKernelFlushNoNode(t *testing.T) {
	nbdnltest.RequireKernel(t)
	b := partitioned(8 << 20)
	d := connect(t, b, blockdev.Options{})
	node := d.Path() + "p1"
	f, err := os.OpenFile(node, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("in a partition"), 0); err != nil {
		t.Fatal(err)
	}
	hidden := node + ".hidden"
	if err := os.Rename(node, hidden); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(hidden)
	if err := d.Flush(t.Context()); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), node) {
		t.Errorf("error %v, want one that names %s", err, node)
	}
	if err := os.Rename(hidden, node); err != nil {
		t.Fatal(err)
	}
	if err := d.Flush(t.Context()); err != nil || !bytes.HasPrefix(b.stored(1<<20, 20), []byte("in a partition")) {
		t.Errorf("error %v, the partition begins with %q", err, b.stored(1<<20, 20))
	}
	f.Close()

	// A partition that has gone is none.
	if err := deletePartition(d.Path(), 1); err != nil {
		t.Fatal(err)
	}
	if err := d.Flush(t.Context()); err != nil {
		t.Errorf("without the partition: %v", err)
	}
}

// deletePartition removes a partition from what the kernel knows.
func deletePartition(disk string, number int) error {
	out, err := exec.Command("delpart", disk, fmt.Sprint(number)).CombinedOutput()
	if err != nil {
		return fmt.Errorf("delpart: %w: %s", err, out)
	}
	if _, err := os.Stat(fmt.Sprintf("%sp%d", disk, number)); !errors.Is(err, syscall.ENOENT) {
		return fmt.Errorf("the partition is still there: %w", err)
	}
	return nil
}

// TestKernelFlushAnother has another device take the index of one whose backend hangs: Flush of the
// former neither writes it nor tells anything of it.
func TestKernelFlushAnother(t *testing.T) {
	nbdnltest.RequireKernel(t)
	b := newRecorder(1 << 20)
	d, err := blockdev.Connect(t.Context(), b, blockdev.Options{})
	if err != nil {
		t.Fatal(err)
	}
	release := hang(b)
	defer release()
	f := open(t, d, os.O_RDONLY|syscall.O_DIRECT)
	read := stuckRead(t, d, f)
	if err := d.Kick(t.Context()); err != nil {
		t.Error(err)
	}
	<-read
	f.Close()

	other := newRecorder(1 << 20)
	next, err := blockdev.ConnectIndex(t.Context(), d.Index(), other, blockdev.Options{})
	if err != nil {
		t.Fatal(err)
	}
	f = open(t, next, os.O_RDWR)
	if _, err := f.WriteAt([]byte("cached"), 0); err != nil {
		t.Fatal(err)
	}
	if err := d.Flush(t.Context()); !errors.Is(err, nbdnl.ErrNotConnected) {
		t.Errorf("error %v, want that it has ended", err)
	}
	if bytes.Contains(other.stored(0, 4096), []byte("cached")) || other.syncs.Load() > 0 {
		t.Errorf("the other device was written, or synced %d times", other.syncs.Load())
	}
	f.Close()
	release()
	<-d.Done()
	if err := d.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	if err := next.Flush(t.Context()); err != nil {
		t.Errorf("Flush of the other: %v", err)
	}
	if err := ended(t, next); err != nil {
		t.Errorf("its end: %v", err)
	}
}
