package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
)

// tools skips a test where the field's own tools are missing; make test
// installs them, and does not let it skip.
func tools(t *testing.T, names ...string) {
	t.Helper()
	for _, name := range names {
		if _, err := exec.LookPath(name); err != nil {
			if os.Getenv("NBD_TEST_REQUIRE") == "1" {
				t.Fatal(err)
			}
			t.Skip(err)
		}
	}
}

// serveFor runs nbdctl serve and returns it with the URI that it prints.
func serveFor(t *testing.T, args ...string) (*exec.Cmd, string, *lockedBuffer) {
	t.Helper()
	cmd := nbdctlCommand(t, append([]string{"serve"}, args...)...)
	stderr := new(lockedBuffer)
	cmd.Stderr = stderr
	return cmd, started(t, cmd), stderr
}

// TestServe has the field's own clients write and read an export, over both
// kinds of socket, and looks at what is in the image in the end.
func TestServe(t *testing.T) {
	tools(t, "qemu-img", "qemu-nbd", "qemu-io")
	dir := shortDir(t)
	for _, listen := range []string{"unix:" + filepath.Join(dir, "s"), "tcp:127.0.0.1:0"} {
		network, address, _ := strings.Cut(listen, ":")
		source, image := filepath.Join(dir, "source"), filepath.Join(dir, network+".img")
		sh(t, "head -c 3M /dev/urandom >"+source+"; truncate -s 16M "+source+"; head -c 1M /dev/urandom >>"+source)
		cmd, uri, stderr := serveFor(t,
			"file", image, "--create", "--size", "17M", "--listen", listen, "--name", "a disk")
		sh(t, "qemu-img convert -n -f raw -O raw "+source+" '"+uri+"'")
		sh(t, "qemu-img compare -f raw -F raw "+source+" '"+uri+"'")
		sh(t, "qemu-io -f raw -c 'write -P 0xaa 4M 64k' -c flush -c 'discard 5M 1M' -c 'write -z 0 64k' "+
			"-c 'write -f -P 0xbb 1M 4k' -c 'read -P 0xaa 4M 64k' '"+uri+"'")
		if network == "unix" {
			if out := sh(t, "qemu-nbd -L -k "+address); !containsAll(out, "'a disk'", "17825792") {
				t.Errorf("the list of exports is\n%s", out)
			}
			if r := nbdctl(t, "serve", "memory", "--size", "1M", "--listen", listen); r.code != int(exit.Busy) {
				t.Errorf("a second server at the same address: code %d, %s", r.code, r.stderr)
			}
		}
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("%v: %s", err, stderr)
		}
		// The same, done directly.
		sh(t, "head -c 64k /dev/zero | tr '\\0' '\\252' | dd of="+source+" bs=64k seek=64 conv=notrunc status=none; "+
			"dd if=/dev/zero of="+source+" bs=64k count=1 conv=notrunc status=none; "+
			"dd if=/dev/zero of="+source+" bs=1M seek=5 count=1 conv=notrunc status=none; "+
			"head -c 4k /dev/zero | tr '\\0' '\\273' | dd of="+source+" bs=4k seek=256 conv=notrunc status=none")
		sh(t, "cmp "+source+" "+image)
	}
}

// TestServeAfterKill shows that the socket that a killed server left is no
// obstacle.
func TestServeAfterKill(t *testing.T) {
	dir := shortDir(t)
	listen := "unix:" + filepath.Join(dir, "s")
	for range 2 {
		cmd, _, _ := serveFor(t, "memory", "--size", "1M", "--listen", listen)
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait() // killed
	}
}
