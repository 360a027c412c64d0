package main

import (
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
)

// TestKernelDirect shows that an image with -o direct=on leaves nothing in the page
// cache, where the same traffic otherwise leaves all of it, and that all else works:
// trims and zeroes make holes, the device grows, and others read what was written.
func TestKernelDirect(t *testing.T) {
	for _, direct := range []string{"off", "on"} {
		t.Run("direct="+direct, func(t *testing.T) {
			requireKernel(t)
			image := filepath.Join(imageDir(t), "disk.img")
			dev := connected(t, "file", image, "--create", "--size", "64M", "-o", "direct="+direct)
			// Everything past the cache of the device itself, so that what is cached is the
			// image's.
			sh(t, "fio --name=traffic --filename="+dev+" --size=8M --minimal "+
				"--ioengine=libaio --direct=1 --iodepth=32 --rw=randwrite --bsrange=512-256k "+
				"--verify=crc32c --do_verify=1 --verify_fatal=1 --fsync=64")
			sh(t, "dd if=/dev/urandom of="+dev+" bs=1M count=16 seek=32 oflag=direct,dsync status=none")
			sh(t, "dd if="+dev+" of=/tmp/written bs=1M iflag=direct status=none")
			cached := number(t, "fincore --noheadings --bytes --output RES "+image)
			if direct == "on" && cached != 0 || direct == "off" && cached < 16<<20 {
				t.Errorf("%d bytes of the image are in the page cache", cached)
			}
			sh(t, "cmp /tmp/written "+image)

			before := number(t, "stat -c %b "+image)
			sh(t, "blkdiscard -o 32M -l 16M "+dev)
			sh(t, "dd if=/dev/zero of=/tmp/written bs=1M count=16 seek=32 conv=notrunc status=none")
			if after := number(t, "sync "+image+"; stat -c %b "+image); after > before-16<<11 {
				t.Errorf("%d sectors are allocated after a trim of 16 MiB, %d before", after, before)
			}
			must(t, "resize", dev, "96M")
			sh(t, "truncate -s 96M /tmp/written; dd if="+dev+" bs=1M iflag=direct status=none | cmp - /tmp/written")
			sh(t, "printf end | dd of="+dev+" bs=512 seek=$((96*2048-1)) conv=sync oflag=direct status=none")
			must(t, "disconnect", dev)
			sh(t, "printf end | dd of=/tmp/written bs=512 seek=$((96*2048-1)) conv=sync,notrunc status=none")
			sh(t, "cmp /tmp/written "+image)
		})
	}
}

// TestKernelDirectImpossible shows what is said where there is nothing but the page
// cache, and that no file stays behind.
func TestKernelDirectImpossible(t *testing.T) {
	requireKernel(t)
	dir := t.TempDir() // in the lab this is in memory
	image := filepath.Join(dir, "disk.img")
	r := nbdctl(t, "connect", "file", image, "--create", "--size", "1M", "-o", "direct=on")
	if !r.ended(exit.Unsupported, "no direct I/O", "leave out -o direct") {
		t.Errorf("exit code %d: %s", r.code, r.stderr)
	}
	if left := files(t, dir); len(left) != 0 {
		t.Errorf("it left %v", left)
	}
}

// number is what a script prints.
func number(t *testing.T, script string) int {
	t.Helper()
	n, err := strconv.Atoi(sh(t, script))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestKernelDirectBlocks shows, on a disk with sectors of 4096 bytes, that the device
// gets such blocks too, with a warning of what that hides, and that smaller ones are
// refused.
func TestKernelDirectBlocks(t *testing.T) {
	requireKernel(t)
	dir := imageDir(t)
	sh(t, "truncate -s 64M "+dir+"/disk; mkdir "+dir+"/mnt")
	loop := sh(t, "losetup --sector-size 4096 --find --show "+dir+"/disk")
	t.Cleanup(func() { sh(t, "umount "+dir+"/mnt; losetup --detach "+loop) })
	sh(t, "mkfs.ext4 -q "+loop+"; mount "+loop+" "+dir+"/mnt; truncate -s 16777728 "+dir+"/mnt/disk.img")
	image := dir + "/mnt/disk.img"

	r := nbdctl(t, "connect", "file", image, "-o", "direct=on", "--block-size", "512")
	if !r.ended(exit.Failure, "blocks of 4096 bytes", "--block-size must be") {
		t.Errorf("exit code %d: %s", r.code, r.stderr)
	}
	r = nbdctl(t, "connect", "file", image, "-o", "direct=on")
	if !r.ended(exit.OK, "blocks of 4096 bytes", "its last 512 bytes") {
		t.Fatalf("exit code %d: %s", r.code, r.stderr)
	}
	dev := strings.TrimSpace(r.stdout)
	size, block := sysfs(t, dev, "size"), sysfs(t, dev, "queue/logical_block_size")
	if size != "32768" || block != "4096" {
		t.Errorf("%s sectors in blocks of %s bytes", size, block)
	}
	verify(t, dev, 8)
	must(t, "disconnect", dev)
}
