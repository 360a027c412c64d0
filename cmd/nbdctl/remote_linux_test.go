package main

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/testdata/certs"
)

// A far server is one whose exports are devices here. It can be killed and started again.
type far struct {
	t      *testing.T
	before []string // words in front of the command
	args   []string
	cmd    *exec.Cmd
	uri    string
	log    *lockedBuffer

	ended error
}

func farServer(t *testing.T, args ...string) *far {
	t.Helper()
	return farServerIn(t, nil, args...)
}

// farServerIn is farServer with words in front of the command.
func farServerIn(t *testing.T, before []string, args ...string) *far {
	t.Helper()
	f := &far{t: t, before: before, args: args}
	f.start()
	t.Cleanup(func() {
		f.kill()
		if t.Failed() {
			t.Logf("the server: %v: %s", f.ended, f.log)
		}
	})
	return f
}

func (f *far) start() {
	f.t.Helper()
	// It serves for longer than other commands may take.
	f.cmd, f.log = selfCommand(f.t, time.Hour, append([]string{"serve"}, f.args...)...), new(lockedBuffer)
	if len(f.before) > 0 {
		path, err := exec.LookPath(f.before[0])
		if err != nil {
			f.t.Fatal(err)
		}
		f.cmd.Args = append(slices.Clone(f.before), append([]string{f.cmd.Path}, f.cmd.Args[1:]...)...)
		f.cmd.Path = path
	}
	f.cmd.Stderr = f.log
	f.uri = started(f.t, f.cmd)
}

func (f *far) kill() {
	if f.cmd == nil {
		return
	}
	_ = f.cmd.Process.Kill() // It may have ended.
	f.ended = f.cmd.Wait()   // By this, or of itself before.
	f.cmd = nil
}

// remoteOf is how a device is connected to its server.
func remoteOf(t *testing.T, dev string) map[string]any {
	t.Helper()
	r, ok := listed(t, dev)["remote"].(map[string]any)
	if !ok {
		t.Fatalf("%s has no remote: %v", dev, listed(t, dev))
	}
	return r
}

// TestKernelRemote makes exports of a server devices, over each transport: what is written to the
// one is in the image of the other.
func TestKernelRemote(t *testing.T) {
	requireKernel(t)
	dir := t.TempDir()
	certs.New(t).Write(t, dir)
	image := filepath.Join(imageDir(t), "disk.img")
	for name, tt := range map[string]struct {
		size           string
		serve, connect []string
		remote         string
	}{
		"direct unix": {size: "4M", remote: "direct simple false 1 1",
			serve: []string{"--listen", "unix:" + filepath.Join(shortDir(t), "s")}},
		"direct several": {size: "4M", remote: "direct simple false 2 2", connect: []string{"--connections", "2"},
			serve: []string{"--listen", "tcp:[::1]:0"}},
		"unix": {size: "4M", remote: "relay extended false 1 1", connect: []string{"-o", "way=relay"},
			serve: []string{"--listen", "unix:" + filepath.Join(shortDir(t), "s")}},
		"several": {size: "4M", serve: []string{"--listen", "tcp:127.0.0.1:0"},
			connect: []string{"--connections", "2", "-o", "way=relay"}, remote: "relay extended false 2 2"},
		"TLS": {size: "4M", remote: "relay extended true 1 1",
			serve: []string{"--listen", "tcp:127.0.0.1:0", "--tls-certificates", dir, "--tls-verify-peer"}},
	} {
		t.Run(name, func(t *testing.T) {
			sh(t, "rm -f "+image)
			args := []string{"file", "--create", "--size", tt.size, image, "--name", "a disk"}
			f := farServer(t, append(args, tt.serve...)...)
			uri := f.uri
			if strings.HasPrefix(uri, "nbds:") {
				uri += "?tls-certificates=" + dir
			}
			dev := connected(t, append([]string{uri}, tt.connect...)...)
			d := listed(t, dev)
			r := remoteOf(t, dev)
			got := fmt.Sprint(r["way"], " ", r["replies"], " ", r["tls"])
			got += fmt.Sprint(" ", r["connections"], " ", r["connections_alive"])
			if got != tt.remote || r["error"] != nil || r["lost_since"] != nil {
				t.Errorf("the remote is %v, want %s", r, tt.remote)
			}
			if !strings.Contains(d["backend"].(string), "/a%20disk") || d["timeout"] != 30.0 ||
				d["dead_timeout"] != 60.0 {
				t.Errorf("list shows %v", d)
			}
			sh(t, "head -c 3M /dev/urandom | dd of="+dev+" bs=64k seek=5 iflag=fullblock conv=fsync status=none")
			sum := sh(t, "sha256sum <"+dev)
			must(t, "disconnect", dev)
			if got := sh(t, "sha256sum <"+image); got != sum {
				t.Errorf("the image has %s, the device had %s", got, sum)
			}
		})
	}
}

// TestKernelRemoteRefused holds what is no device, and why.
func TestKernelRemoteRefused(t *testing.T) {
	requireKernel(t)
	f := farServer(t, "memory", "--size", "66000", "--name", "x", "--listen", "unix:"+filepath.Join(shortDir(t), "s"))
	other := strings.Replace(f.uri, "/x?", "/no?", 1)
	dev := connected(t, f.uri, "-o", "way=relay") // What is less than a block is left out.
	direct := connected(t, f.uri)
	for _, dev := range []string{dev, direct} {
		if d := listed(t, dev); d["size"] != 65536.0 {
			t.Errorf("list shows %v", d)
		}
	}
	for _, tt := range []struct {
		args string
		code exit.Code
		says string
	}{
		{"connect " + other, exit.NotFound, "no such export"},
		{"connect " + f.uri + "&x=1", exit.Usage, "unknown parameter"},
		{"connect nbd+unix:///x?socket=/none", exit.Failure, "no such file"},
		{"connect " + f.uri + " disk.img", exit.Usage, "takes a URI alone"},
		{"connect --create --size 1M " + f.uri, exit.Usage, "an export is made by its server"},
		{"connect --size 1M " + f.uri, exit.Usage, "has 65536 bytes"},
		{"connect --dead-timeout 0s " + f.uri, exit.Usage, "use 1s or more"},
		{"connect -o wait=on " + f.uri, exit.Usage, "only await"},
		{"connect -o way=there " + f.uri, exit.Usage, "the ways are direct and relay"},
		{"connect -o way=direct nbds+unix:///x?socket=/none", exit.Unsupported, "it knows no TLS"},
		{"connect -o way=direct nbd+vsock://1/", exit.Unsupported, "TCP and Unix sockets only"},
		{"serve -o way=direct --listen unix:/tmp/none " + f.uri, exit.Unsupported, "an export is served here"},
		{"reconfigure --timeout 5s " + dev, exit.Unsupported, "are those of connect"},
		{"resize " + dev + " 1M", exit.Unsupported, ""},
		{"resize " + direct + " 1M", exit.Unsupported, "the kernel speaks with the server itself"},
		{"stats " + direct, exit.Unsupported, "way=relay"},
	} {
		r := nbdctl(t, strings.Fields(tt.args)...)
		if r.code != int(tt.code) || !strings.Contains(r.stderr, tt.says) {
			t.Errorf("%s: exit code %d, want %d: %s; want %q", tt.args, r.code, tt.code, r.stderr, tt.says)
		}
	}
	must(t, "reconfigure", "--timeout", "5s", direct)
	if d := listed(t, direct); d["timeout"] != 5.0 {
		t.Errorf("after reconfigure list shows %v", d)
	}
	must(t, "disconnect", dev)
	must(t, "disconnect", direct)
}

// TestKernelRemoteBlocks has a server that takes large blocks only: the device has small ones all
// the same, also while the server is killed and started again.
func TestKernelRemoteBlocks(t *testing.T) {
	requireKernel(t, lostNoise)
	for name, tt := range map[string]struct {
		block, connect string
		restart        bool
	}{
		"above a page":       {block: "32768", connect: "--timeout 5s", restart: true},
		"above --block-size": {block: "4096", connect: "--timeout 5s --block-size 512"},
	} {
		t.Run(name, func(t *testing.T) {
			image := filepath.Join(imageDir(t), "disk.img")
			f := farServer(t, "file", "--create", "--size", "32M", image, "--block-size", tt.block,
				"--listen", "unix:"+filepath.Join(shortDir(t), "s"))
			args := append([]string{"connect", f.uri}, strings.Fields(tt.connect)...)
			r := nbdctl(t, append(args, "-o", "way=direct")...)
			if r.code != int(exit.Unsupported) || !strings.Contains(r.stderr, tt.block+" bytes that it asks for") &&
				!strings.Contains(r.stderr, "asks for blocks of "+tt.block) {
				t.Errorf("directly: exit code %d, %s", r.code, r.stderr)
			}
			r = nbdctl(t, args...)
			if r.code != 0 || !strings.Contains(r.stderr, "takes blocks of "+tt.block+" bytes only") {
				t.Fatalf("exit code %d: %s", r.code, r.stderr)
			}
			dev := strings.TrimSpace(r.stdout)
			if size, block := sysfs(t, dev, "size"), sysfs(t, dev, "queue/logical_block_size"); size != "65536" ||
				block != "512" {
				t.Errorf("%s sectors in blocks of %s bytes", size, block)
			}
			if far := remoteOf(t, dev); far["way"] != "relay" || fmt.Sprint(far["block_size"]) != tt.block {
				t.Errorf("the remote is %v", far)
			}
			if out := must(t, "status", dev); !strings.Contains(out, ", blocks of "+tt.block+" bytes,") {
				t.Errorf("status says %s", out)
			}

			// Sectors are written all at once, in any order, and with a size that is no multiple.
			sh(t, "fio --name=sectors --filename="+dev+" --size=2M --minimal --ioengine=libaio --direct=1 "+
				"--iodepth=32 --rw=randwrite --bs=512 --verify=crc32c --do_verify=1 --verify_fatal=1 "+
				"--random_generator=tausworthe64")
			if tt.restart {
				v := verifiedLoad(t, dev)
				before := writes(t, dev)
				f.kill()
				f.start()
				v.goesOn(before)
				v.stop()
			}
			sum := sh(t, "sha256sum <"+dev)
			must(t, "disconnect", dev)
			if got := sh(t, "sha256sum <"+image); got != sum {
				t.Errorf("the image has %s, the device had %s", got, sum)
			}
		})
	}
}

// bothWays runs a test for a device of each way to be connected to a server.
func bothWays(t *testing.T, test func(t *testing.T, way string)) {
	t.Helper()
	for _, way := range []string{"direct", "relay"} {
		t.Run(way, func(t *testing.T) { test(t, "way="+way) })
	}
}

// awayNoise is what the kernel says of reads that fail.
const awayNoise = lostNoise + `|Buffer I/O error|I/O error, dev nbd|blk_update_request|Other side returned error \(5\)`

// TestKernelRemoteAway has a server go away for longer than requests wait: they fail then, list
// says why, and the device goes on when the server is back, and not with another export.
func TestKernelRemoteAway(t *testing.T) {
	requireKernel(t, awayNoise)
	bothWays(t, testRemoteAway)
}

func testRemoteAway(t *testing.T, way string) {
	image := filepath.Join(imageDir(t), "disk.img")
	sh(t, "head -c 1M /dev/zero >"+image)
	f := farServer(t, "file", image, "--listen", "unix:"+filepath.Join(shortDir(t), "s"))
	dev := connected(t, f.uri, "--dead-timeout", "2s", "-o", way)
	read := func() result {
		return finish(t, command(t, "dd", "if="+dev, "iflag=direct", "bs=64k", "count=1", "of=/dev/null"))
	}
	f.kill()
	if r := read(); r.code == 0 || !strings.Contains(r.stderr, "Input/output error") {
		t.Errorf("without a server: %d, %s", r.code, r.stderr)
	}
	r := nbdctl(t, "list")
	if !strings.Contains(r.stdout, "waiting") || !strings.Contains(r.stderr, "has no connection to "+f.uri) ||
		!strings.Contains(r.stderr, "requests fail") {
		t.Errorf("list says %s%s", r.stdout, r.stderr)
	}

	// Another image has its place meanwhile.
	sh(t, "mv "+image+" "+image+".1; head -c 2M /dev/zero >"+image)
	f.start()
	eventually(t, func() bool {
		text, _ := statusOf(t, dev)["remote"].(map[string]any)["error"].(string)
		return strings.Contains(text, "another export than before: it has 2097152 bytes, and had 1048576")
	}, "the refusal of another image")
	f.kill()
	sh(t, "mv "+image+".1 "+image)
	f.start()
	eventually(t, func() bool { return remoteOf(t, dev)["connections_alive"] == 1.0 }, "the server")
	if r := read(); r.code != 0 {
		t.Errorf("when the server is back: %d, %s", r.code, r.stderr)
	}
	if got := listed(t, dev)["state"]; got != "live" {
		t.Errorf("the state is %v", got)
	}
	if way == "way=direct" { // Nobody here knows whether there was anything to write meanwhile.
		r = nbdctl(t, "disconnect", dev)
		if r.code != int(exit.Failure) || !strings.Contains(r.stderr, "writes may be lost") || listed(t, dev) != nil {
			t.Errorf("disconnect: %d, %s", r.code, r.stderr)
		}
		return
	}
	must(t, "disconnect", dev)
}

// TestKernelRemoteAwait has connect wait for a server that is away.
func TestKernelRemoteAwait(t *testing.T) {
	requireKernel(t)
	f := farServer(t, "memory", "--size", "1M", "--listen", "unix:"+filepath.Join(shortDir(t), "s"))
	f.kill()
	connecting := begin(t, nbdctlCommand(t, "connect", "-o", "await=on", f.uri))
	f.start()
	r := <-connecting
	if r.code != 0 {
		t.Fatalf("connect: %d, %s", r.code, r.stderr)
	}
	must(t, "disconnect", strings.TrimSpace(r.stdout))
}

// TestKernelRemoteSilent has a server that is stopped: what was asked of it is asked again of the
// one that takes its place.
func TestKernelRemoteSilent(t *testing.T) {
	requireKernel(t, lostNoise)
	bothWays(t, testRemoteSilent)
}

func testRemoteSilent(t *testing.T, way string) {
	image := filepath.Join(imageDir(t), "disk.img")
	sh(t, "head -c 1M /dev/zero >"+image)
	args := []string{"file", image, "-o", "lock=off", "--listen"}
	f := farServer(t, append(args, "unix:"+filepath.Join(shortDir(t), "s"))...)
	dev := connected(t, f.uri, "--timeout", "2s", "-o", way)
	if err := f.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	reading := begin(t, command(t, "dd", "if="+dev, "iflag=direct", "bs=64k", "count=1", "of=/dev/null"))
	eventually(t, func() bool { return remoteOf(t, dev)["error"] != nil }, "the loss of a silent server")
	f.kill()
	f.start()
	if r := <-reading; r.code != 0 {
		t.Errorf("the read: %d, %s", r.code, r.stderr)
	}
	must(t, "disconnect", dev)
}

// TestKernelRemoteOrphan kills the process that watches over a device to which the kernel is
// connected itself: the device goes on, list says so, and disconnect ends it in order.
func TestKernelRemoteOrphan(t *testing.T) {
	requireKernel(t)
	image := filepath.Join(imageDir(t), "disk.img")
	f := farServer(t, "file", "--create", "--size", "4M", image, "--listen", "tcp:127.0.0.1:0")
	dev := connected(t, f.uri, "--restart", "no")
	pid := int(listed(t, dev)["owner"].(map[string]any)["pid"].(float64))
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool { return listed(t, dev)["state"] == "orphaned" }, "an orphan")
	sh(t, "head -c 1M /dev/urandom | dd of="+dev+" bs=64k iflag=fullblock status=none") // cached
	r := nbdctl(t, "list")
	if !strings.Contains(r.stderr, "I/O goes on") {
		t.Errorf("list says %s", r.stderr)
	}
	sum := sh(t, "sha256sum <"+dev)
	must(t, "disconnect", dev)
	if got := sh(t, "sha256sum <"+image); got != sum {
		t.Errorf("the image has %s, the device had %s", got, sum)
	}
}

// TestServeRelay has a server offer what another one has, in a form that its clients do not have of
// it.
func TestServeRelay(t *testing.T) {
	near, far := shortDir(t), shortDir(t)
	_, uri, _ := servedFor(t, "memory", "--size", "3M", "--read-only", "--listen", "unix:"+filepath.Join(far, "s"))
	_, again, _ := servedFor(t, uri, "--name", "again", "--listen", "unix:"+filepath.Join(near, "s"))
	e := informed(t, again).Exports
	if len(e) != 1 || e[0].Name != "again" || e[0].Size != 3<<20 || !e[0].ReadOnly {
		t.Errorf("the relay offers %+v", e)
	}
	if got := mapped(t, again, "base:allocation"); got != "0+3145728 hole,zero\n" {
		t.Errorf("its map is %s", got)
	}
}
