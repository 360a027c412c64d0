package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// TestKernelSession is the main job, on each backend: connect, list, a file
// system with data that survives the page cache, fsck, fio's verify at queue
// depth 32, disconnect.
func TestKernelSession(t *testing.T) { mainJob(t, "netlink") }

// TestKernelIoctlSession is the same by ioctls.
func TestKernelIoctlSession(t *testing.T) { mainJob(t, "ioctl", "--ioctl") }

func mainJob(t *testing.T, mode string, flags ...string) {
	for _, tt := range []struct {
		name string
		args func(t *testing.T) []string
	}{
		{"memory", func(*testing.T) []string { return []string{"--size", "256M", "memory"} }},
		{"file", func(t *testing.T) []string {
			return []string{"file", "--create", "--size", "256M", filepath.Join(imageDir(t), "disk.img")}
		}},
		{"file, direct", func(t *testing.T) []string {
			image := filepath.Join(imageDir(t), "disk.img")
			return []string{"file", "-o", "direct=on", "--create", "--size", "256M", image}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			requireKernel(t)
			args := append(flags, tt.args(t)...)
			dev := connected(t, args...)
			d := listed(t, dev)
			want := map[string]any{
				"state":             "live",
				"size":              float64(256 << 20),
				"block_size":        512.0,
				"read_only":         false,
				"mode":              mode,
				"connections":       1.0,
				"connections_alive": 1.0,
				"timeout":           30.0,
				"dead_timeout":      map[string]float64{"netlink": 60, "ioctl": 0}[mode],
				"label":             nil,
				"path":              dev,
			}
			for key, v := range want {
				if d[key] != v {
					t.Errorf("list says %s: %v, want %v", key, d[key], v)
				}
			}
			verify(t, dev, 48)
			fileSystem(t, dev)
			must(t, "disconnect", dev)
			if d := listed(t, dev); d != nil {
				t.Errorf("after disconnect list shows %v", d)
			}
			if size := sysfs(t, dev, "size"); size != "0" {
				t.Errorf("after disconnect the size is %s", size)
			}
			if tt.name != "memory" {
				image := args[len(args)-1]
				sh(t, "e2fsck -fn "+image)
				got := sh(t, "debugfs -R 'cat /data' "+image+" 2>/dev/null | sha256sum")
				if want := sh(t, "sha256sum </tmp/data"); got != want {
					t.Errorf("the image has other data than were written: %s, want %s", got, want)
				}
			}
		})
	}
}

// verify runs fio's crc32c verification over the first megabytes of dev.
func verify(t *testing.T, dev string, megabytes int) {
	t.Helper()
	sh(t, fmt.Sprintf("fio --name=verify --filename=%s --size=%dM --minimal "+
		"--ioengine=libaio --direct=1 --iodepth=32 --rw=randwrite --bsrange=4k-128k "+
		"--verify=crc32c --do_verify=1 --verify_fatal=1 --verify_backlog=256 --random_generator=tausworthe64",
		dev, megabytes))
}

// fileSystem makes one, writes /tmp/data to it, and reads it back from the
// device.
func fileSystem(t *testing.T, dev string) {
	t.Helper()
	mnt := t.TempDir()
	sh(t, "mkfs.ext4 -q "+dev)
	sh(t, "mount "+dev+" "+mnt)
	defer func() { finish(t, command(t, "umount", mnt)) }()
	sh(t, "head -c 20000000 /dev/urandom >/tmp/data; cp /tmp/data "+mnt+"/data; sync; echo 3 >/proc/sys/vm/drop_caches")
	if got, want := sh(t, "sha256sum <"+mnt+"/data"), sh(t, "sha256sum </tmp/data"); got != want {
		t.Errorf("read back %s, wrote %s", got, want)
	}
	sh(t, "umount "+mnt)
	sh(t, "fsck.ext4 -fn "+dev)
}

// TestKernelFlags shows that each flag of connect has its effect, that list
// and status tell it, and that the kernel's view agrees.
func TestKernelFlags(t *testing.T) {
	requireKernel(t)
	image := filepath.Join(imageDir(t), "disk.img")
	sh(t, "truncate -s 64M "+image)
	dev := connected(t, "file", image, "--device", "nbd5", "--block-size", "4096", "--connections", "2",
		"--timeout", "45s", "--dead-timeout", "2m", "--read-only", "--name", "golden")
	if dev != "/dev/nbd5" {
		t.Errorf("--device nbd5 gives %s", dev)
	}
	status := statusOf(t, "golden")
	for key, want := range map[string]any{
		"name":         "nbd5",
		"index":        5.0,
		"path":         "/dev/nbd5",
		"state":        "live",
		"size":         float64(64 << 20),
		"block_size":   4096.0,
		"connections":  2.0,
		"read_only":    true,
		"timeout":      45.0,
		"dead_timeout": 120.0,
		"label":        "golden",
		"backend":      "file " + image,
		"mode":         "netlink",
		"last_error":   nil,
	} {
		if status[key] != want {
			t.Errorf("status says %s: %v, want %v", key, status[key], want)
		}
	}
	attributes := map[string]string{
		"size":                     "131072",
		"ro":                       "1",
		"queue/logical_block_size": "4096",
		"queue/max_sectors_kb":     "1024",
	}
	identifier, _ := status["identifier"].(string)
	if nbdnltest.Identifiers.In(t) {
		attributes["backend"] = identifier
		if !regexp.MustCompile(`^nbdctl:[0-9a-f-]{36}$`).MatchString(identifier) {
			t.Errorf("the identifier is %q", identifier)
		}
	} else if identifier != "" {
		t.Errorf("the identifier is %q, of a kernel that keeps none", identifier)
	}
	for attribute, want := range attributes {
		if got := sysfs(t, dev, attribute); got != want {
			t.Errorf("the kernel says %s: %s, want %s", attribute, got, want)
		}
	}
	owner := status["owner"].(map[string]any)
	if comm := sh(t, fmt.Sprintf("cat /proc/%.0f/comm", owner["pid"])); comm != "nbdctl" || owner["ours"] != true {
		t.Errorf("the owner is %v, whose command is %s", owner, comm)
	}
	if log, ok := status["log"].(string); !ok || !strings.Contains(sh(t, "cat "+log), "msg=connected") {
		t.Errorf("the log %v does not tell of the connect", status["log"])
	}
	write := command(t, "dd", "if=/dev/zero", "of="+dev, "bs=4096", "count=1", "oflag=direct")
	if r := finish(t, write); r.code == 0 {
		t.Error("a read-only device can be written")
	}
	for _, word := range []string{
		"nbd5", "live", "64M", "file " + image, "golden", "netlink", "4096", "yes", "45s+2m",
	} {
		if table := must(t, "list"); !strings.Contains(table, word) {
			t.Errorf("list does not show %q:\n%s", word, table)
		}
	}
	must(t, "disconnect", "golden")
}

// TestKernelJSON shows that every key is always there, for a stranger's or an
// idle device too.
func TestKernelJSON(t *testing.T) {
	requireKernel(t)
	var connect map[string]any
	if err := json.Unmarshal([]byte(must(t, "connect", "memory", "--size", "1M", "--json")), &connect); err != nil {
		t.Fatal(err)
	}
	defer must(t, "disconnect", connect["path"].(string))
	keys := []string{
		"name", "index", "path", "state", "size", "block_size", "label", "backend", "mode",
		"connections", "connections_alive", "read_only", "features", "timeout", "dead_timeout",
		"identifier", "since", "owner", "loss", "restart", "remote",
	}
	more := append(keys, "log", "last_error", "traffic", "holders")
	all := listJSON(t, "--all")
	if len(all) < 2 {
		t.Fatalf("list --all shows %d devices", len(all))
	}
	objects := append(all, connect, statusOf(t, connect["name"].(string)))
	for i, object := range objects {
		want := keys
		if i >= len(all) {
			want = more
		}
		for _, key := range want {
			if _, ok := object[key]; !ok {
				t.Errorf("%v has no key %q", object["name"], key)
			}
		}
		if len(object) != len(want) {
			t.Errorf("%v has %d keys, want %d", object, len(object), len(want))
		}
		if owner, ok := object["owner"].(map[string]any); !ok || len(owner) != 2 {
			t.Errorf("the owner is %v", object["owner"])
		}
	}
}

// TestKernelPartitions shows that the partitions of an image are there when
// connect returns, and gone when disconnect does.
func TestKernelPartitions(t *testing.T) {
	requireKernel(t)
	image := filepath.Join(imageDir(t), "disk.img")
	sh(t, "truncate -s 64M "+image+"; printf 'label: gpt\n,16M\n,\n' | sfdisk -q "+image)
	dev := connected(t, "file", image)
	if got := sysfs(t, dev, filepath.Base(dev)+"p1/size"); got != "32768" {
		t.Errorf("the first partition has %s sectors, want 32768", got)
	}
	if _, err := os.Stat(dev + "p2"); err != nil {
		t.Error(err)
	}
	must(t, "disconnect", dev)
	if left, _ := filepath.Glob(dev + "p*"); len(left) != 0 {
		t.Errorf("after disconnect there are %v", left)
	}
}

// TestKernelTail shows that the part of a block at the end of an image is
// left out, with a warning, and not touched.
func TestKernelTail(t *testing.T) {
	requireKernel(t)
	image := filepath.Join(imageDir(t), "disk.img")
	sh(t, "head -c 1049000 /dev/urandom >"+image+"; tail -c 424 "+image+" >/tmp/tail")
	r := nbdctl(t, "connect", "file", image)
	if r.code != 0 || !strings.Contains(r.stderr, "last 424 bytes") {
		t.Fatalf("connect: code %d, stderr %q", r.code, r.stderr)
	}
	dev := strings.TrimSpace(r.stdout)
	if got := sysfs(t, dev, "size"); got != "2048" {
		t.Errorf("the device has %s sectors, want 2048", got)
	}
	sh(t, "dd if=/dev/zero of="+dev+" bs=1M count=1 oflag=direct status=none")
	must(t, "disconnect", dev)
	sh(t, "tail -c 424 "+image+" | cmp - /tmp/tail; test $(stat -c %s "+image+") = 1049000")
}

// TestKernelForeground shows that --foreground serves until interrupted, that
// a held device refuses the first Ctrl-C and not the second.
func TestKernelForeground(t *testing.T) {
	requireKernel(t, `I/O error|NBD_DISCONNECT`)
	for _, held := range []bool{false, true} {
		cmd := nbdctlCommand(t, "connect", "--foreground", "memory", "--size", "1M")
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		var stderr lockedBuffer
		cmd.Stderr = &stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		line := make([]byte, 64)
		n, err := out.Read(line)
		if err != nil {
			t.Fatalf("no device: %v\n%s", err, stderr.String())
		}
		dev := strings.TrimSpace(string(line[:n]))
		var holder *os.File
		if held {
			if holder, err = os.Open(dev); err != nil {
				t.Fatal(err)
			}
			interrupt(t, cmd)
			stderr.await(t, "goes on serving")
			if d := listed(t, dev); d["state"] != "live" {
				t.Errorf("after the refused Ctrl-C: %v", d)
			}
			interrupt(t, cmd)
			stderr.await(t, "although held")
			holder.Close()
		} else {
			interrupt(t, cmd)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("held %v: %v\n%s", held, err, stderr.String())
		}
	}
}
