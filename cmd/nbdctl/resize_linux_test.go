package main

import (
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
)

// TestKernelResize makes a device longer under mounted file systems that
// follow, and shorter.
func TestKernelResize(t *testing.T) {
	for _, tt := range []struct{ fs, mkfs, grow, check string }{
		{"ext4", "mkfs.ext4 -q", "resize2fs", "e2fsck -fn"},
		{"xfs", "mkfs.xfs -q", "xfs_growfs", "xfs_repair -n"},
	} {
		t.Run(tt.fs, func(t *testing.T) {
			requireKernel(t)
			image := filepath.Join(imageDir(t), "disk.img")
			dev := connected(t, "file", image, "--create", "--size", "320M", "--name", "growing")
			mnt := t.TempDir()
			sh(t, tt.mkfs+" "+dev+"; modprobe -q "+tt.fs+" || true; mount "+dev+" "+mnt)
			defer func() { finish(t, command(t, "umount", "-l", mnt)) }()
			sh(t, "head -c 20000000 /dev/urandom >"+mnt+"/data; sync")
			sum := sh(t, "sha256sum <"+mnt+"/data")

			want := filepath.Base(dev) + " is 512M (536870912 bytes)\n"
			if got := must(t, "resize", "growing", "+192M"); got != want {
				t.Errorf("resize prints %q, want %q", got, want)
			}
			if got := sysfs(t, dev, "size"); got != "1048576" {
				t.Errorf("the kernel shows %s sectors", got)
			}
			if d := listed(t, dev); d["size"] != float64(512<<20) {
				t.Errorf("list shows %v", d)
			}
			target := dev
			if tt.fs == "xfs" {
				target = mnt
			}
			sh(t, tt.grow+" "+target)
			if got := sh(t, "df -BM --output=size "+mnt+" | tail -1"); strings.TrimSpace(got) < "430M" {
				t.Errorf("the file system has %s", got)
			}
			sh(t, "head -c 380000000 /dev/zero >"+mnt+"/more; sync; echo 3 >/proc/sys/vm/drop_caches")
			if got := sh(t, "sha256sum <"+mnt+"/data"); got != sum {
				t.Errorf("read back %s, wrote %s", got, sum)
			}
			if r := nbdctl(t, "resize", dev, "320M"); !r.ended(exit.Busy, mnt, "--force") {
				t.Errorf("made shorter although mounted: code %d, %q", r.code, r.stderr)
			}
			sh(t, "umount "+mnt+"; "+tt.check+" "+dev)
			if got := sh(t, "stat -c %s "+image); got != "536870912" {
				t.Errorf("the image has %s bytes", got)
			}
			must(t, "resize", dev, "-500M")
			if got := sh(t, "stat -c %s "+image) + " " + sysfs(t, dev, "size"); got != "12582912 24576" {
				t.Errorf("made shorter: image and sectors are %s", got)
			}
			must(t, "disconnect", dev)
		})
	}
}

// TestKernelResizeRefused shows what is refused, with nothing changed.
func TestKernelResizeRefused(t *testing.T) {
	requireKernel(t)
	dev := connected(t, "memory", "--size", "64M")
	other := stranger(t)
	for _, tt := range []struct {
		args []string
		code exit.Code
		says string
	}{
		{[]string{"nbd9", "1M"}, exit.NotFound, "nbd9"},
		{[]string{other, "2M"}, exit.Permission, "not ours"},
		{[]string{dev, "1000"}, exit.Usage, "multiple of the block size 512"},
		{[]string{dev, "-64M"}, exit.Usage, "nothing would be left"},
		{[]string{dev, "0"}, exit.Usage, "nothing would be left"},
	} {
		if r := nbdctl(t, append([]string{"resize"}, tt.args...)...); !r.ended(tt.code, tt.says) {
			t.Errorf("resize %v: code %d, %q; want %d, %q", tt.args, r.code, r.stderr, tt.code, tt.says)
		}
	}
	if got := sysfs(t, dev, "size"); got != "131072" {
		t.Errorf("the device has %s sectors", got)
	}
	must(t, "disconnect", dev)
}

// TestKernelResizeGivenUp asks a stopped process to cut off the end of a device
// and gives up: it must not do so when it goes on.
func TestKernelResizeGivenUp(t *testing.T) {
	requireKernel(t)
	dev := connected(t, "memory", "--size", "64M")
	pid := kill(t, dev, syscall.SIGSTOP)
	r := nbdctl(t, "resize", dev, "-32M")
	if r.code != int(exit.Failure) || !strings.Contains(r.stderr, "does not answer") {
		t.Errorf("resize: code %d, %s", r.code, r.stderr)
	}
	if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	// It answers, in turn, what comes after.
	if got := must(t, "resize", dev, "+32M"); !strings.Contains(got, "96M") {
		t.Errorf("afterwards: %s", got)
	}
	must(t, "disconnect", dev)
}

// TestKernelReconfigure changes the timeouts of a live device.
func TestKernelReconfigure(t *testing.T) {
	requireKernel(t)
	dev := connected(t, "memory", "--size", "64M")
	want := filepath.Base(dev) + " has timeout 2m, dead timeout 7s\n"
	if got := must(t, "reconfigure", dev, "--timeout", "2m", "--dead-timeout", "7s"); got != want {
		t.Errorf("reconfigure prints %q, want %q", got, want)
	}
	if d := listed(t, dev); d["timeout"] != 120.0 || d["dead_timeout"] != 7.0 {
		t.Errorf("list shows %v", d)
	}
	// The kernel shows the block layer's timer, in milliseconds.
	if got := sysfs(t, dev, "queue/io_timeout"); got != "120000" {
		t.Errorf("the kernel's timer is %s ms", got)
	}
	must(t, "disconnect", dev)
}
