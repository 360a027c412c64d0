package main

import (
	"fmt"
	"strconv"
	"strings"
	"testing"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
)

// TestKernelSparse shows that a memory device far larger than the machine
// takes memory as it is written and gives it back when trimmed or zeroed.
func TestKernelSparse(t *testing.T) {
	requireKernel(t)
	dev := connected(t, "memory", "--size", "1T")
	pid := strconv.Itoa(int(listed(t, dev)["owner"].(map[string]any)["pid"].(float64)))
	// What the serving process has of its store, in MiB.
	store := func() int {
		n, err := strconv.Atoi(sh(t, "cd /proc/"+pid+"/fd; "+
			"for f in $(ls -l | awk '/memfd/ {print $9}'); do stat -L -c %b $f; done | awk '{n += $1} END {print n}'"))
		if err != nil {
			t.Fatal(err)
		}
		return n / 2048
	}
	const written = 64
	empty := store()
	write := fmt.Sprintf("dd if=/dev/urandom of=%s bs=1M count=%d seek=$((1024*1000)) oflag=direct status=none",
		dev, written)
	sh(t, write)
	if got := store() - empty; got < written || got > written+8 {
		t.Errorf("%d MiB written take %d MiB", written, got)
	}
	sh(t, "blkdiscard -o $((1024*1000))M "+dev)
	if got := store() - empty; got > 1 {
		t.Errorf("after the trim %d MiB are still taken", got)
	}
	sh(t, write+"; blkdiscard -z -o $((1024*1000))M -l "+strconv.Itoa(written)+"M "+dev)
	read := fmt.Sprintf("dd if=%s bs=1M count=%d skip=$((1024*1000)) iflag=direct status=none", dev, written)
	if got := sh(t, read+" | tr -d '\\0' | wc -c"); got != "0" {
		t.Errorf("after zeroing %s bytes are not zero", got)
	}
	must(t, "disconnect", dev)
}

// TestKernelFull shows that writing more than the machine has fails with "no
// space", which the kernel's OOM killer never learns of.
func TestKernelFull(t *testing.T) {
	requireKernel(t, `I/O error|Other side returned error`)
	dev := connected(t, "memory", "--size", "1T")
	pid := strconv.Itoa(int(listed(t, dev)["owner"].(map[string]any)["pid"].(float64)))
	r := finish(t, command(t, "dd", "if=/dev/zero", "of="+dev, "bs=4M", "oflag=direct"))
	if r.code == 0 {
		t.Fatal("1 TiB fits into this machine")
	}
	t.Log(lastLine(r.stderr))
	e, ok := statusOf(t, dev)["last_error"].(map[string]any)
	if !ok || e["op"] != "write" || !strings.Contains(e["error"].(string), "no space left") {
		t.Errorf("the last error is %v", e)
	}
	// What was there still is, and the device works.
	sh(t, "kill -0 "+pid+"; dd if="+dev+" of=/dev/null bs=1M count=16 iflag=direct status=none")
	sh(t, "dd if=/dev/zero of="+dev+" bs=1M count=16 oflag=direct status=none")
	sh(t, "blkdiscard "+dev+"; dd if=/dev/zero of="+dev+" bs=1M count=16 seek=1000 oflag=direct status=none")
	if out := sh(t, "dmesg"); strings.Contains(out, "Out of memory") || strings.Contains(out, "oom-kill") {
		t.Error("the OOM killer came")
	}
	r = nbdctl(t, "disconnect", dev)
	if !r.ended(exit.Failure, "no space left") || !strings.Contains(r.stdout, "disconnected") {
		t.Errorf("disconnect of a device that has failed writes: exit code %d, %q, %s", r.code, r.stdout, r.stderr)
	}
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return lines[len(lines)-1]
}
