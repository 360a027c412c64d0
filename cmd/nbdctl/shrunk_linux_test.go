package main

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
)

// shrunkNoise is what the kernel may say when reads fail. A connection that is
// lost says more.
const shrunkNoise = `I/O error|Other side returned error|EXT4-fs|callbacks suppressed`

// wantLive holds that no connection of dev was lost, and that it still serves.
func wantLive(t *testing.T, dev string, connections int) {
	t.Helper()
	d := listed(t, dev)
	if d == nil || d["state"] != "live" || d["connections_alive"] != float64(connections) {
		t.Errorf("list shows %v", d)
	}
	path, _ := statusOf(t, dev)["log"].(string)
	for line := range strings.Lines(sh(t, "cat "+path)) {
		if strings.Contains(line, "connection lost") || strings.Contains(line, "not replaced") {
			t.Errorf("the log says: %s", line)
		}
	}
}

// TestKernelShrunkImage writes a new image over the one that is served (cp
// empties it first), under dd and a mounted file system: some reads fail, no
// connection is lost, and at the end the device has what the image has.
func TestKernelShrunkImage(t *testing.T) {
	requireKernel(t, shrunkNoise)
	dir := imageDir(t)
	image, fresh, mnt := filepath.Join(dir, "disk.img"), filepath.Join(dir, "new.img"), t.TempDir()
	sh(t, fmt.Sprintf("truncate -s 48M %s; mkfs.ext4 -qF %[1]s", fresh))
	sh(t, fmt.Sprintf("mount -o loop %s %s && head -c 24M /dev/urandom >%[2]s/data; umount %[2]s", fresh, mnt))
	sh(t, fmt.Sprintf("cp %s %s", fresh, image))
	dev := connected(t, "file", image, "--connections", "2", "--read-only")
	sh(t, "mount -o ro,noload "+dev+" "+mnt)
	defer func() { finish(t, command(t, "umount", mnt)) }()

	const rounds = 25
	copying := fmt.Sprintf("for i in $(seq %d); do cp %s %s || exit 1; done", rounds, fresh, image)
	done := begin(t, command(t, "sh", "-c", copying))
	failed, reads := 0, 0
	for over := false; !over; {
		select {
		case r := <-done:
			over = true
			if r.code != 0 {
				t.Fatalf("cp: %s", r.stderr)
			}
		default:
		}
		for _, reader := range []string{
			"dd if=" + dev + " of=/dev/null bs=1M iflag=direct status=none",
			"echo 3 >/proc/sys/vm/drop_caches; cat " + mnt + "/data >/dev/null",
		} {
			r := finish(t, command(t, "sh", "-c", reader))
			reads++
			if r.code != 0 {
				failed++
				if !strings.Contains(r.stderr, "Input/output error") {
					t.Errorf("%s: code %d, %s", reader, r.code, r.stderr)
				}
			}
		}
	}
	t.Logf("%d of %d readers were failed", failed, reads)
	wantLive(t, dev, 2)
	got := sh(t, "dd if="+dev+" bs=1M iflag=direct status=none | sha256sum")
	if want := sh(t, "sha256sum <"+fresh); got != want {
		t.Error("the device has something else than the image")
	}
	sh(t, "umount "+mnt)
	must(t, "disconnect", dev)
}

// TestKernelShrunkDevice serves a block device that fails in the middle of what
// the page cache has, and then gets shorter.
func TestKernelShrunkDevice(t *testing.T) {
	requireKernel(t, shrunkNoise)
	table := func(how, lines string) {
		sh(t, fmt.Sprintf("modprobe -q dm-mod || true; printf '%s' | dmsetup %s --noudevsync shrinking", lines, how))
	}
	// Only of what does nothing but zeros does device mapper promise that reads need not wait, when
	// it is opened.
	table("create", `0 131072 zero\n`)
	sh(t, "dmsetup mknodes")
	defer sh(t, "dmsetup remove --noudevsync shrinking")
	backing := "/dev/mapper/shrinking"
	dev := connected(t, "file", backing, "--connections", "2", "--read-only")
	table("reload", `0 16384 zero\n16384 8 error\n16392 114680 zero\n`)
	sh(t, "dmsetup resume --noudevsync shrinking")
	read := func(megabyte, count int, fine bool) {
		t.Helper()
		r := finish(t, command(t, "dd", "if="+dev, "of=/dev/null", "bs=1M", "iflag=direct", "status=none",
			fmt.Sprint("skip=", megabyte), fmt.Sprint("count=", count)))
		if fine != (r.code == 0) || !fine && !strings.Contains(r.stderr, "Input/output error") {
			t.Errorf("%d MiB at %d MiB: code %d, %s", count, megabyte, r.code, r.stderr)
		}
	}
	// All of it is in the page cache, a page of the 9th MiB without content.
	sh(t, "dd if="+backing+" of=/dev/null bs=4k conv=noerror status=none 2>/dev/null || true")
	for range 5 {
		read(0, 8, true)
		read(8, 1, false)
		read(9, 16, true)
	}
	table("reload", `0 33000 zero\n`) // 16 MiB, and a bit
	sh(t, "dmsetup resume --noudevsync shrinking")
	for range 5 {
		read(0, 16, true)
		read(16, 1, false)
		read(40, 8, false)
	}
	wantLive(t, dev, 2)
	must(t, "disconnect", dev)
}
