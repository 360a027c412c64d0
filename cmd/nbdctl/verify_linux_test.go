package main

import (
	"fmt"
	"path/filepath"
	"runtime"
	"testing"
)

// A stretch is what fio jobs of TestKernelVerify write and verify, each its share.
type stretch struct {
	block string // sizes of the requests
	depth int
	size  int // MiB, of all shares
}

// stretches cover one request at a time and as many as the kernel sends, from a sector
// up to the longest request that it makes.
var stretches = []stretch{
	{"512-512", 1, 1},
	{"512-8k", 32, 2},
	{"4k-4k", 1, 1},
	{"4k-4k", 32, 2},
	{"4k-4k", 128, 2},
	{"64k-64k", 8, 4},
	{"128k-128k", 32, 8},
	{"1m-1m", 4, 16},
	{"512-1m", 32, 16},
}

// TestKernelVerify has fio write, and verify by checksum what it reads back, on
// every backend, with requests of all lengths at all depths; images once more from a
// fresh process. In a machine with several processors there are as many connections,
// up to four, and each writes stretches of its own, at the same time as the others.
func TestKernelVerify(t *testing.T) {
	connections := min(4, runtime.NumCPU())
	for _, backend := range []string{"memory", "file", "direct"} {
		t.Run(fmt.Sprintf("%s over %d", backend, connections), func(t *testing.T) {
			requireKernel(t)
			args := []string{"memory", "--size", "512M"}
			switch image := filepath.Join(imageDir(t), "disk.img"); backend {
			case "file":
				args = []string{"file", image, "--create", "--size", "512M"}
			case "direct":
				args = []string{"file", image, "--create", "--size", "512M", "-o", "direct=on"}
			}
			args = append(args, "--connections", fmt.Sprint(connections))
			dev := connected(t, args...)
			fio := func(how string) result {
				return finish(t, commandFor(t, 2*patience, "fio", verifyJobs(dev, connections, how)...))
			}
			if out := fio("--do_verify=1"); out.code != 0 {
				t.Fatalf("fio: exit code %d\n%s%s", out.code, out.stdout, out.stderr)
			}
			for i, c := range statusOf(t, dev)["traffic"].([]any) {
				if n := c.(map[string]any)["write"].(map[string]any)["requests"].(float64); n == 0 {
					t.Errorf("connection %d carried no write", i)
				}
			}
			if backend != "memory" {
				must(t, "disconnect", dev)
				dev = connected(t, args...)
				if out := fio("--verify_only=1"); out.code != 0 {
					t.Errorf("fio, once more: exit code %d\n%s%s", out.code, out.stdout, out.stderr)
				}
			}
			if backend == "memory" { // The checks can fail: a few bytes in the middle of a stretch are others.
				sh(t, "printf 'never written' | dd of="+dev+" bs=1 seek=2100000 conv=notrunc,fsync status=none")
				sh(t, "blockdev --flushbufs "+dev)
				if out := fio("--verify_only=1"); out.code == 0 {
					t.Error("fio verifies what was not written")
				}
			}
			must(t, "disconnect", dev)
		})
	}
}

// verifyJobs are the stretches one after the other, with as many jobs at a time as there
// are connections.
func verifyJobs(dev string, jobs int, how string) []string {
	args := []string{
		how, "--filename=" + dev, "--minimal",
		"--ioengine=libaio", "--direct=1", "--rw=randwrite", "--randseed=4711",
		"--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0",
	}
	offset := 0 // KiB
	for i, s := range stretches {
		for cpu := range jobs {
			size := s.size << 10 / jobs
			args = append(args,
				fmt.Sprintf("--name=%d-%d", i, cpu),
				fmt.Sprintf("--offset=%dk", offset),
				fmt.Sprintf("--size=%dk", size),
				fmt.Sprintf("--iodepth=%d", s.depth),
				"--bsrange="+s.block)
			if jobs > 1 {
				args = append(args, fmt.Sprintf("--cpus_allowed=%d", cpu))
			}
			if cpu == 0 {
				args = append(args, "--stonewall")
			}
			offset += size
		}
	}
	return args
}
