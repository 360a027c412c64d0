package blockdev_test

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// btrfsDisks returns an empty btrfs on two disks (mkfs.btrfs --mixed -d single -m single -n 4096,
// of btrfs-progs 6.2).
func btrfsDisks(t *testing.T) [2]*recorder {
	t.Helper()
	f, err := os.Open("testdata/btrfs.tar.gz")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	var disks [2]*recorder
	images := tar.NewReader(z)
	for i := range disks {
		h, err := images.Next()
		if err != nil {
			t.Fatal(err)
		}
		disks[i] = newRecorder(int(h.Size))
		if _, err := io.ReadFull(images, disks[i].data); err != nil {
			t.Fatal(err)
		}
	}
	return disks
}

// TestKernelFlushBtrfs writes what a btrfs keeps back that lies on two devices, which stand
// elsewhere than it says, from either of them; and one that is mounted in another mount namespace
// only, and covered there.
func TestKernelFlushBtrfs(t *testing.T) {
	nbdnltest.RequireKernel(t)
	_ = exec.Command("modprobe", "-C", "/dev/null", "-q", "btrfs").Run() // It may be built in.
	b := btrfsDisks(t)
	d := [2]*blockdev.Device{connect(t, b[0], blockdev.Options{}), connect(t, b[1], blockdev.Options{})}
	volume := mapped(t, "above", d[1].Path(), len(b[1].data)/512)
	options := fmt.Sprintf("device=%s,device=%s", d[0].Path(), volume)
	stored := func(p []byte) bool { return b[0].has(p) || b[1].has(p) }
	check := func(dir string, through int) {
		t.Helper()
		content := bytes.Repeat(fmt.Appendf(nil, "cached, to be written through %d, below %s. ", through, dir), 500)
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint("file", through)), content, 0o600); err != nil {
			t.Fatal(err)
		}
		if stored(content[:4096]) {
			t.Fatal("the file system keeps nothing back: there is nothing to show")
		}
		if err := d[through].Flush(t.Context()); err != nil {
			t.Error(err)
		}
		if !stored(content[:4096]) {
			t.Errorf("through %d: the backends have not got what the file system below %s had cached", through, dir)
		}
	}
	dir := t.TempDir()
	if err := unix.Mount(d[0].Path(), dir, "btrfs", 0, options); err != nil {
		t.Fatalf("mount: %v", err)
	}
	check(dir, 0)
	check(dir, 1)
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatalf("unmount: %v", err)
	}

	elsewhere := exec.CommandContext(t.Context(), "unshare", "--mount", "--propagation", "private", "bash", "-ec",
		`mount -t btrfs -o "$0" "$1" "$2"; mkdir "$2/a b"; mount --bind "$2/a b" "$3"
		mount -t tmpfs tmpfs "$2"; echo mounted; read || true; umount "$3" "$2" "$2"`,
		options, d[0].Path(), dir, t.TempDir())
	elsewhere.Stderr = t.Output()
	end, err := elsewhere.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := elsewhere.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := elsewhere.Start(); err != nil {
		t.Fatal(err)
	}
	defer elsewhere.Wait()
	defer end.Close()
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatalf("%q, %v", line, err)
	}
	check(filepath.Join("/proc", fmt.Sprint(elsewhere.Process.Pid), "root", elsewhere.Args[len(elsewhere.Args)-1]), 0)
}
