package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// TestKernelStuckSwap disconnects and kicks a device that the kernel swaps to and whose
// process is stopped: the one is refused at once, and after the other the device is gone when
// the swap is.
func TestKernelStuckSwap(t *testing.T) {
	requireKernel(t, kickNoise+"|rite-error on swap|ead-error on swap")
	dev := connected(t, "memory", "--size", "16M", "--timeout", "1h")
	sh(t, "mkswap -q "+dev+" 2>/dev/null; swapon "+dev)
	kill(t, dev, syscall.SIGSTOP)
	reader := stuckReader(t, dev)
	refusedSoon(t, dev, "swap on")
	kicking := begin(t, nbdctlCommand(t, "kick", dev))
	if r := <-reader; r.code == 0 || !strings.Contains(r.stderr, "Input/output error") {
		t.Errorf("the reader: code %d, %s", r.code, r.stderr)
	}
	// Whose it was is told by its identifier alone, and what the driver keeps of it until the last
	// close by nothing.
	if d := listed(t, dev); d == nil || nbdnltest.Identifiers.In(t) && d["state"] == "live" {
		t.Errorf("before swapoff list shows %v", d)
	}
	sh(t, "swapoff "+dev)
	if r := <-kicking; r.code != 0 {
		t.Errorf("kick: code %d, %q", r.code, r.stderr)
	}
	eventually(t, func() bool { return listed(t, dev) == nil }, "the end of the device")
}

// refusedSoon checks that disconnect is refused with the holder's name, although nothing of
// the device answers.
func refusedSoon(t *testing.T, dev, holder string) {
	t.Helper()
	start := time.Now()
	r := nbdctl(t, "disconnect", dev)
	if r.code != 6 || !strings.Contains(r.stderr, holder) || !strings.Contains(r.stderr, "--force") {
		t.Errorf("disconnect: code %d, %q, want that it is held by a %s", r.code, r.stderr, holder)
	}
	if took := time.Since(start); took > 20*time.Second {
		t.Errorf("the refusal took %s", took)
	}
}

// TestKernelHeavyJournal disconnects and kicks a device below an ext4 that writes all data to
// its journal first, under programs that sync all the time.
func TestKernelHeavyJournal(t *testing.T) {
	for _, end := range []string{"disconnect", "kick"} {
		t.Run(end, func(t *testing.T) {
			requireKernel(t, kickNoise+`|EXT4-fs|JBD2|Aborting journal|Buffer I/O`)
			image := filepath.Join(imageDir(t), "disk.img")
			dev := connected(t, "file", image, "--create", "--size", "96M", "--timeout", "1h")
			tmp := t.TempDir()
			mnt := filepath.Join(tmp, "mnt")
			sh(t, "mkfs.ext4 -q -J size=16 "+dev+"; mkdir "+mnt+"; mount -o data=journal "+dev+" "+mnt)
			mounted := true
			defer func() {
				if mounted {
					finish(t, command(t, "umount", "-l", mnt))
				}
			}()
			var writers []<-chan result
			for w := range 3 {
				writer := command(t, "sh", "-c", `n=0
until test -e $TMP/stop; do
	n=$((n+1))
	head -c 300000 /dev/urandom >$TMP/next$W &&
	dd if=$TMP/next$W of=$MNT/file$W.$((n % 4)) conv=fsync bs=64k status=none &&
	mv $TMP/next$W $TMP/copy$W.$((n % 4)) || exit 1
done`)
				writer.Env = append(os.Environ(), "TMP="+tmp, "MNT="+mnt, fmt.Sprintf("W=%d", w))
				writers = append(writers, begin(t, writer))
			}
			working := func() bool { _, err := os.Stat(tmp + "/copy0.2"); return err == nil }
			eventually(t, working, "the journal to have work")
			stop := func() {
				if err := os.WriteFile(tmp+"/stop", nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if end == "disconnect" {
				refusedSoon(t, dev, "mount of")
				stop()
				for _, w := range writers {
					if r := <-w; r.code != 0 {
						t.Errorf("a writer: code %d, %s", r.code, r.stderr)
					}
				}
				sh(t, "umount "+mnt)
				mounted = false
				must(t, "disconnect", dev)
				sh(t, "e2fsck -fn "+image+" >/dev/null 2>&1")
				sh(t, "cd "+tmp+"; IMAGE="+image+`
for f in copy*; do debugfs -R "cat /file${f#copy}" $IMAGE 2>/dev/null | cmp - $f; done`)
				return
			}
			kill(t, dev, syscall.SIGSTOP)
			eventually(t, func() bool { return hasInFlight(t, dev) }, "the journal to hang")
			refusedSoon(t, dev, "mount of")
			start := time.Now()
			kicking := begin(t, nbdctlCommand(t, "kick", dev))
			for _, w := range writers {
				if r := <-w; r.code == 0 {
					t.Error("a writer has not noticed")
				}
			}
			if took := time.Since(start); took > 30*time.Second {
				t.Errorf("the writers came free after %s", took)
			}
			sh(t, "umount "+mnt)
			mounted = false
			if r := <-kicking; r.code != 0 {
				t.Errorf("kick: code %d, %q", r.code, r.stderr)
			}
			eventually(t, func() bool { return listed(t, dev) == nil }, "the end of the device")
			// What was synced before is there, as after a power cut.
			sh(t, "e2fsck -fy "+image+" >/dev/null 2>&1 || test $? = 1")
		})
	}
}

// TestKernelDisconnectStuckBackend disconnects a device whose backend does not answer: that ends
// with the timeout of the requests, with an error, and the device is gone; the process follows when
// the backend lets it.
func TestKernelDisconnectStuckBackend(t *testing.T) {
	requireKernel(t, kickNoise)
	loop := loopDevice(t, "4M", "")
	sh(t, "modprobe -q dm-mod || true")
	sh(t, "dmsetup create --noudevsync hanging --table '0 8192 linear "+loop+" 0'; dmsetup mknodes")
	defer sh(t, "dmsetup remove --noudevsync hanging")
	dev := connected(t, "file", "/dev/mapper/hanging", "--timeout", "2s", "--restart", "no")
	sh(t, "dd if=/dev/urandom of="+dev+" bs=64k count=4 oflag=direct conv=fsync status=none")
	sh(t, "dmsetup suspend --noflush hanging")
	start := time.Now()
	r := nbdctl(t, "disconnect", dev)
	t.Logf("code %d after %s: %s%s", r.code, time.Since(start), r.stdout, r.stderr)
	if took := time.Since(start); r.code != 1 || took > 30*time.Second {
		t.Errorf("disconnect: code %d after %s", r.code, took)
	}
	eventually(t, func() bool { return listed(t, dev) == nil }, "the end of the device")
	sh(t, "dmsetup resume hanging")
	eventually(t, func() bool { return len(serving(t, os.Getenv("NBDCTL_STATE_DIR"))) == 0 }, "the end of the process")
}
