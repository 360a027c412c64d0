package main

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
)

// loopDevice makes a loop device of a new image, and returns its path.
func loopDevice(t *testing.T, size string, flags string) string {
	t.Helper()
	image := filepath.Join(imageDir(t), "below.img")
	sh(t, "modprobe -q loop || true; truncate -s "+size+" "+image)
	dev := sh(t, "losetup --find --show "+flags+" "+image)
	t.Cleanup(func() { sh(t, "losetup --detach "+dev+"; blockdev --setrw "+dev) }) // That stays otherwise.
	return dev
}

// TestKernelReadOnlyBacking shows that an image or device that can be read and not written is
// refused, with what to do, and that this then does: the page cache would have acknowledged
// writes that are lost.
func TestKernelReadOnlyBacking(t *testing.T) {
	requireKernel(t)
	const block = "the block device is read-only"
	for _, tt := range []struct {
		name, says string
		code       exit.Code
		make       func(t *testing.T) string
	}{
		{"read-only loop device", block, exit.Failure, func(t *testing.T) string {
			return loopDevice(t, "4M", "--read-only")
		}},
		{"set read-only", block, exit.Failure, func(t *testing.T) string {
			loop := loopDevice(t, "4M", "")
			sh(t, "blockdev --setro "+loop)
			return loop
		}},
		{"partition of a read-only disk", block, exit.Failure, func(t *testing.T) string {
			image := filepath.Join(imageDir(t), "disk.img")
			sh(t, "modprobe -q loop || true; truncate -s 8M "+image+"; printf 'label: dos\n2048\n' | sfdisk -q "+image)
			loop := sh(t, "losetup --find --show --partscan --read-only "+image)
			t.Cleanup(func() { sh(t, "losetup --detach "+loop) })
			return loop + "p1"
		}},
		{"read-only table of the device mapper", block, exit.Failure, func(t *testing.T) string {
			loop := loopDevice(t, "4M", "")
			sh(t, "modprobe -q dm-mod || true")
			sh(t, "dmsetup create --readonly --noudevsync read-only --table '0 8192 linear "+loop+" 0'")
			sh(t, "dmsetup mknodes")
			t.Cleanup(func() { sh(t, "dmsetup remove --noudevsync read-only") })
			return "/dev/mapper/read-only"
		}},
		{"read-only nbd device", block, exit.Failure, func(t *testing.T) string {
			dev := connected(t, "memory", "--size", "4M", "--read-only")
			t.Cleanup(func() { must(t, "disconnect", dev) })
			return dev
		}},
		{"read-only mount", "its file system is read-only", exit.Failure, func(t *testing.T) string {
			dir := t.TempDir()
			sh(t, "mount -t tmpfs tmpfs "+dir+"; truncate -s 4M "+dir+"/disk.img; mount -o remount,ro "+dir)
			t.Cleanup(func() { sh(t, "umount "+dir) })
			return dir + "/disk.img"
		}},
		{"immutable", "it is immutable (chattr +i)", exit.Permission, func(t *testing.T) string {
			return attributed(t, "i")
		}},
		{"append-only", "it is append-only (chattr +a)", exit.Permission, func(t *testing.T) string {
			return attributed(t, "a")
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := tt.make(t)
			r := nbdctl(t, "connect", "file", path)
			want := "nbdctl: file: " + path + ": it can't be written: " + tt.says + "; use --read-only\n"
			if r.code != int(tt.code) || r.stdout != "" || r.stderr != want {
				t.Errorf("exit code %d, %q%q, want %d, %q", r.code, r.stdout, r.stderr, tt.code, want)
			}
			if tt.says == block && path != "/dev/mapper/read-only" {
				return // They are one to those who read.
			}
			dev := connected(t, "file", path, "--read-only")
			if got := sysfs(t, dev, "ro"); got != "1" {
				t.Errorf("the kernel says ro: %s", got)
			}
			sh(t, "dd if="+dev+" of=/dev/null bs=1M iflag=direct status=none")
			sh(t, "! dd if=/dev/zero of="+dev+" bs=4k count=1 status=none 2>/dev/null")
			must(t, "disconnect", dev)
		})
	}
}

// attributed makes an image with an attribute of chattr.
func attributed(t *testing.T, attribute string) string {
	t.Helper()
	image := filepath.Join(imageDir(t), "disk.img")
	sh(t, "truncate -s 4M "+image+"; chattr +"+attribute+" "+image)
	t.Cleanup(func() { sh(t, "chattr -"+attribute+" "+image) })
	return image
}

// TestKernelSwapFile shows that what the kernel swaps to is in use.
func TestKernelSwapFile(t *testing.T) {
	requireKernel(t)
	image := filepath.Join(imageDir(t), "swap")
	sh(t, "dd if=/dev/zero of="+image+" bs=1M count=4 status=none; chmod 600 "+image)
	sh(t, "mkswap "+image+"; swapon "+image)
	r := nbdctl(t, "connect", "file", image)
	if want := "nbdctl: file: " + image + ": in use as swap space\n"; r.code != int(exit.Busy) || r.stderr != want {
		t.Errorf("exit code %d, %q, want %d, %q", r.code, r.stderr, exit.Busy, want)
	}
	sh(t, "swapoff "+image)
	must(t, "disconnect", connected(t, "file", image))
}

// TestKernelTurnsReadOnly takes the right to write away from what stands below a device:
// who writes and syncs is told, and so is who disconnects.
func TestKernelTurnsReadOnly(t *testing.T) {
	for _, tt := range []struct {
		name, cause string
		make        func(t *testing.T) (backing, turn string)
	}{
		{"device", "operation not permitted", func(t *testing.T) (string, string) {
			loop := loopDevice(t, "4M", "")
			return loop, "blockdev --setro " + loop
		}},
		{"file system after an error", "", func(t *testing.T) (string, string) {
			loop, dir := loopDevice(t, "32M", ""), t.TempDir()
			sh(t, "mkfs.ext4 -q "+loop+"; mount -o errors=remount-ro "+loop+" "+dir+"; truncate -s 4M "+dir+"/disk.img")
			t.Cleanup(func() { sh(t, "umount "+dir) })
			return dir + "/disk.img", "echo test >/sys/fs/ext4/" + filepath.Base(loop) + "/trigger_fs_error"
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			requireKernel(t, `I/O error|rite error|EXT4-fs|JBD2|Other side returned error`)
			backing, turn := tt.make(t)
			dev := connected(t, "file", backing)
			sh(t, "dd if=/dev/urandom of=/tmp/written bs=64k count=1 status=none")
			sh(t, "dd if=/tmp/written of="+dev+" conv=fsync status=none")
			sh(t, turn)
			r := finish(t, command(t, "dd", "if=/dev/urandom", "of="+dev, "bs=64k", "count=1", "seek=8", "conv=fsync"))
			if r.code == 0 || !strings.Contains(r.stderr, "Input/output error") {
				t.Errorf("a write that is lost was acknowledged: code %d, %s", r.code, r.stderr)
			}
			e, ok := statusOf(t, dev)["last_error"].(map[string]any)
			if !ok || !strings.Contains(e["error"].(string), tt.cause) {
				t.Errorf("the last error is %v, want %q", e, tt.cause)
			}
			// What was written before is there, unless the file system lets nobody read any more
			// (Linux 6.12 does not): then that is an I/O error, and the device lives.
			r = finish(t, command(t, "dd", "if="+dev, "of=/tmp/read", "bs=64k", "count=1", "iflag=direct"))
			if r.code == 0 {
				sh(t, "cmp /tmp/read /tmp/written")
			} else if _, err := os.ReadFile(backing); err == nil {
				t.Errorf("what was written before can't be read: %s", r.stderr)
			}
			if d := listed(t, dev); d == nil || d["state"] != "live" {
				t.Errorf("list shows %v", d)
			}
			r = nbdctl(t, "disconnect", dev)
			if r.code != int(exit.Failure) || !strings.Contains(r.stderr, "did not reach the backend") {
				t.Errorf("disconnect: exit code %d, %s", r.code, r.stderr)
			}
			t.Log(strings.TrimSpace(r.stderr))
			if listed(t, dev) != nil {
				must(t, "disconnect", "--force", dev)
			}
		})
	}
}

// TestKernelFileLimit limits the length of files: at connect that is told, later it is an
// I/O error, and SIGXFSZ ends no process.
func TestKernelFileLimit(t *testing.T) {
	requireKernel(t, `I/O error|rite error|Other side returned error`)
	image := filepath.Join(imageDir(t), "disk.img")
	sh(t, "truncate -s 8M "+image)
	limited := nbdctlCommand(t, "connect", "file", image)
	limited.Args = append([]string{"bash", "-c", `ulimit -f 1024; exec "$0" "$@"`, limited.Path}, limited.Args[1:]...)
	limited.Path = "/bin/bash"
	r := finish(t, limited)
	want := "nbdctl: file: " + image + ": it can't be written: " +
		"this process may write the first 1048576 bytes of a file only (ulimit -f), and it has 8388608; " +
		"use --read-only\n"
	if r.code != int(exit.Failure) || r.stderr != want {
		t.Errorf("exit code %d, %q, want %q", r.code, r.stderr, want)
	}

	dev := connected(t, "file", image)
	pid := strconv.Itoa(int(listed(t, dev)["owner"].(map[string]any)["pid"].(float64)))
	sh(t, "prlimit --pid "+pid+" --fsize=1048576:1048576")
	sh(t, "dd if=/dev/urandom of=/tmp/written bs=64k count=16 status=none")
	sh(t, "dd if=/tmp/written of="+dev+" oflag=direct conv=fsync status=none")
	beyond := command(t, "dd", "if=/dev/zero", "of="+dev, "bs=64k", "count=1", "seek=16", "conv=fsync")
	if r := finish(t, beyond); r.code == 0 {
		t.Error("a write beyond the limit was acknowledged")
	}
	e, ok := statusOf(t, dev)["last_error"].(map[string]any)
	if !ok || !strings.Contains(e["error"].(string), "file too large") {
		t.Errorf("the last error is %v", e)
	}
	if _, err := os.Stat("/proc/" + pid); err != nil {
		t.Errorf("the serving process: %v", err)
	}
	if r := nbdctl(t, "resize", dev, "16M"); r.code != int(exit.Failure) || !strings.Contains(r.stderr, "ulimit -f") {
		t.Errorf("resize beyond the limit: exit code %d, %q", r.code, r.stderr)
	}
	sh(t, "dd if="+dev+" bs=64k count=16 iflag=direct status=none | cmp - /tmp/written")
	if r := nbdctl(t, "disconnect", dev); r.code != int(exit.Failure) || !strings.Contains(r.stderr, "file too large") {
		t.Errorf("disconnect: exit code %d, %q", r.code, r.stderr)
	}
}
