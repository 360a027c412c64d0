package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
)

// name is what messages call the device at path.
func name(path string) string { return filepath.Base(path) }

// tower connects an image, a device that is stored on that device, and one on a
// partition of the second. It returns the image and the devices, from below.
func tower(t *testing.T) (image string, devices []string) {
	t.Helper()
	image = filepath.Join(imageDir(t), "ground.img")
	sh(t, "truncate -s 32M "+image)
	ground := connected(t, "file", image)
	middle := connected(t, "file", ground)
	sh(t, fmt.Sprintf("printf '1M,8M\n' | sfdisk -q --no-tell-kernel %s; blockdev --rereadpt %s", middle, middle))
	return image, []string{ground, middle, connected(t, "file", middle+"p1")}
}

// TestKernelStackedDevices shows that devices which are stored on each other go
// in one call, top first, with what is cached in each, however they are named.
func TestKernelStackedDevices(t *testing.T) {
	for _, line := range []string{"--all", "0 1 2", "2 0 1", "--all --force", "--force 0 1 2 0"} {
		t.Run(line, func(t *testing.T) {
			requireKernel(t)
			image, devices := tower(t)
			written := bytes.Repeat([]byte("stacked\n"), 1<<17)
			if err := os.WriteFile(devices[2], written, 0o600); err != nil {
				t.Fatal(err)
			}
			args := []string{"disconnect"}
			for _, word := range strings.Fields(line) {
				if i := strings.Index("012", word); i >= 0 {
					word = devices[i]
				}
				args = append(args, word)
			}
			r := nbdctl(t, args...)
			want := fmt.Sprintf("%s disconnected\n%s disconnected\n%s disconnected\n",
				name(devices[2]), name(devices[1]), name(devices[0]))
			if r.code != 0 || r.stdout != want || r.stderr != "" {
				t.Errorf("code %d, stdout %q, stderr %q; want %q", r.code, r.stdout, r.stderr, want)
			}
			f, err := os.Open(image)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			got := make([]byte, len(written))
			if _, err := f.ReadAt(got, 1<<20); err != nil || !bytes.Equal(got, written) {
				t.Errorf("the image has %q at the partition, want %q (error %v)", got[:16], written[:16], err)
			}
		})
	}
}

// TestKernelStackedHeld shows that what somebody else has made of a device, or
// mounted of it, keeps that device and no other, and is named.
func TestKernelStackedHeld(t *testing.T) {
	for _, tt := range []struct {
		name string
		// set and unset are done with the lowest device in $DEV. set prints what the upper one
		// is to be stored on.
		set, unset string
		holder     string
	}{
		{
			"mount",
			"mkfs.ext4 -q $DEV; mkdir -p /tmp/stacked; mount $DEV /tmp/stacked; " +
				"truncate -s 4M /tmp/stacked/disk.img; echo /tmp/stacked/disk.img",
			"umount /tmp/stacked", "mount of NAME at /tmp/stacked",
		},
		{
			"device mapper",
			"modprobe -q dm-mod || true; echo 0 8192 linear $DEV 0 | dmsetup create --noudevsync stacked; " +
				"dmsetup mknodes; echo /dev/mapper/stacked",
			"dmsetup remove --noudevsync stacked", "device stacked on NAME",
		},
		{
			"loop device",
			"losetup --find --show $DEV >/tmp/loop; cat /tmp/loop",
			"losetup --detach $(cat /tmp/loop)", "on NAME",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			requireKernel(t)
			ground := connected(t, "memory", "--size", "16M")
			other := connected(t, "memory", "--size", "1M")
			storage := sh(t, "DEV="+ground+"; "+tt.set)
			upper := connected(t, "file", storage)
			r := nbdctl(t, "disconnect", "--all")
			if !r.ended(exit.Busy, strings.ReplaceAll(tt.holder, "NAME", name(ground))) {
				t.Errorf("code %d, stderr %q, want that %s is held by %q", r.code, r.stderr, ground, tt.holder)
			}
			for _, dev := range []string{upper, other} {
				if !strings.Contains(r.stdout, name(dev)+" disconnected\n") {
					t.Errorf("stdout is %q, without %s", r.stdout, dev)
				}
			}
			sh(t, tt.unset)
			if out := must(t, "disconnect", "--all"); out != name(ground)+" disconnected\n" {
				t.Errorf("then stdout is %q", out)
			}
		})
	}
}

// TestKernelStackedGoes shows that what goes by itself with the device above is
// waited for: a loop device that nobody is to use any more.
func TestKernelStackedGoes(t *testing.T) {
	requireKernel(t)
	ground := connected(t, "memory", "--size", "16M")
	loop := sh(t, "losetup --find --show "+ground)
	upper := connected(t, "file", loop)
	sh(t, "losetup --detach "+loop) // takes place when the upper device lets go of it
	if out := must(t, "disconnect", "--all"); out != name(upper)+" disconnected\n"+name(ground)+" disconnected\n" {
		t.Errorf("stdout is %q", out)
	}
}
