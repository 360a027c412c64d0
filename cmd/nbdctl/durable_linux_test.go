package main

import (
	"fmt"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
)

// TestKernelSameBytes shows that an image written through a device is byte
// for byte what the same writes make directly, by qemu-img's judgement.
func TestKernelSameBytes(t *testing.T) {
	requireKernel(t)
	dir := imageDir(t)
	direct, through := filepath.Join(dir, "direct.img"), filepath.Join(dir, "through.img")
	sh(t, "truncate -s 64M "+direct)
	dev := connected(t, "file", through, "--create", "--size", "64M")
	for _, target := range []string{direct, dev} {
		// The same seed: the same writes, trims and zeroes at the same places.
		sh(t, "fio --name=same --filename="+target+" --size=64M --minimal --ioengine=psync --rw=randwrite "+
			"--bsrange=512-64k --bsrange=4k-64k --io_size=32M --randseed=4711 "+
			"--refill_buffers=1 --buffer_pattern=0xfeedface --end_fsync=1")
		sh(t, "head -c 100000 /dev/zero | tr '\\0' '\\252' | "+
			"dd of="+target+" bs=1000 seek=777 conv=notrunc,fsync status=none")
	}
	must(t, "disconnect", dev)
	sh(t, "qemu-img compare -f raw -F raw "+direct+" "+through)
	sh(t, "cmp "+direct+" "+through)
	// And the comparison can fail.
	sh(t, "printf x | dd of="+through+" bs=1 seek=12345678 conv=notrunc status=none")
	if r := finish(t, command(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", direct, through)); r.code != 1 {
		t.Errorf("qemu-img compares different images as code %d: %s", r.code, r.stdout)
	}
}

// TestKernelFlushIsDurable shows from outside, by strace's fault injection
// into the serving process, that a FLUSH is answered after fdatasync and by
// what it answered: a delayed fdatasync delays the user's fsync, a failed one
// fails it. Past the page cache that is no different: the disk has a cache too.
func TestKernelFlushIsDurable(t *testing.T) {
	for _, direct := range []string{"off", "on"} {
		t.Run("direct="+direct, func(t *testing.T) {
			requireKernel(t, `I/O error|Other side returned error`)
			image := filepath.Join(imageDir(t), "disk.img")
			flushIsDurable(t, "file", image, "--create", "--size", "64M", "-o", "direct="+direct)
		})
	}
}

func flushIsDurable(t *testing.T, args ...string) {
	dev := connected(t, args...)
	pid := fmt.Sprintf("%.0f", listed(t, dev)["owner"].(map[string]any)["pid"])
	write := "dd if=/dev/zero of=" + dev + " bs=4k count=1 seek=%d oflag=direct conv=fsync status=none"

	t.Run("in order", func(t *testing.T) {
		trace := traced(t, pid, "-e trace=pwrite64,pwritev2,fdatasync", fmt.Sprintf(write, 1), 0)
		wrote, synced := strings.Index(trace, "pwrite"), strings.LastIndex(trace, "fdatasync")
		if wrote < 0 || synced < wrote {
			t.Errorf("no write followed by fdatasync:\n%s", trace)
		}
	})
	t.Run("FUA", func(t *testing.T) {
		synchronous := "dd if=/dev/zero of=" + dev + " bs=4k count=1 oflag=direct,dsync status=none"
		trace := traced(t, pid, "-e trace=pwrite64,pwritev2,fdatasync", synchronous, 0)
		if !strings.Contains(trace, "RWF_DSYNC") {
			t.Errorf("a synchronous write is not written with RWF_DSYNC:\n%s", trace)
		}
	})
	t.Run("delayed", func(t *testing.T) {
		start := time.Now()
		traced(t, pid, "-e trace=fdatasync -e inject=fdatasync:delay_exit=1500000", fmt.Sprintf(write, 2), 0)
		if took := time.Since(start); took < 1500*time.Millisecond {
			t.Errorf("fsync returned after %s, before fdatasync did", took)
		}
	})
	t.Run("failed", func(t *testing.T) {
		traced(t, pid, "-e trace=fdatasync -e inject=fdatasync:error=EIO", fmt.Sprintf(write, 3), 1)
		e, ok := statusOf(t, dev)["last_error"].(map[string]any)
		if !ok || e["op"] != "flush" || !strings.Contains(e["error"].(string), "input/output error") {
			t.Errorf("status has the last error %v", statusOf(t, dev)["last_error"])
		}
	})
	// The backend remembers that data may be lost, so this one must insist.
	must(t, "disconnect", "--force", dev)
}

// traced runs script, which must exit with code, while strace follows the
// process pid, and returns what strace saw.
func traced(t *testing.T, pid, options, script string, code int) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), "trace")
	strace := command(t, "sh", "-c", "exec strace -f -p "+pid+" -o "+out+" "+options)
	var said lockedBuffer
	strace.Stderr = &said
	if err := strace.Start(); err != nil {
		t.Fatal(err)
	}
	said.await(t, "attached")
	r := finish(t, command(t, "sh", "-c", script))
	interrupt(t, strace)
	_ = strace.Wait() // ended by our signal
	if r.code != code {
		t.Errorf("exit code %d, want %d, from: %s\n%s", r.code, code, script, r.stderr)
	}
	return sh(t, "cat "+out)
}

// TestKernelMultiSession shows several connections in use at once, with the
// data right. The kernel uses as many as there are processors.
func TestKernelMultiSession(t *testing.T) {
	for _, connections := range []int{2, 4} {
		t.Run(fmt.Sprint(connections), func(t *testing.T) {
			requireKernel(t)
			dev := connected(t, "memory", "--size", "64M", "--connections", fmt.Sprint(connections))
			var jobs strings.Builder
			// Which processors send over which connection differs from kernel to kernel.
			for cpu := range runtime.NumCPU() {
				fmt.Fprintf(&jobs, " --name=cpu%d --cpus_allowed=%[1]d --offset=%dM", cpu, 3*cpu)
			}
			sh(t, "fio --filename="+dev+" --size=3M --ioengine=libaio --direct=1 --iodepth=32 --rw=randwrite --bs=4k "+
				"--verify=crc32c --do_verify=1 --verify_fatal=1 --minimal"+jobs.String())
			traffic := statusOf(t, dev)["traffic"].([]any)
			if len(traffic) != connections {
				t.Fatalf("status shows %d connections, want %d", len(traffic), connections)
			}
			for i, c := range traffic[:min(connections, runtime.NumCPU())] {
				if n := c.(map[string]any)["write"].(map[string]any)["requests"].(float64); n == 0 {
					t.Errorf("connection %d carried no write: %v", i, traffic)
				} else {
					t.Logf("connection %d: %.0f writes", i, n)
				}
			}
			must(t, "disconnect", dev)
		})
	}
}
