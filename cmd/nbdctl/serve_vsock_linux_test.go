package main

import (
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/nbdctl/nbdctl/backends/nbd"
)

// TestKernelServeVsock serves clients by the sockets between virtual machines and their host, of
// which both are this machine here.
func TestKernelServeVsock(t *testing.T) {
	requireKernel(t)
	tools(t, "nbdinfo", "nbdcopy", "qemu-img")
	sh(t, "modprobe vsock_loopback")
	control := filepath.Join(shortDir(t), "ctl")
	cmd, uri, _ := servedFor(t, "memory", "--size", "8M", "--listen", "vsock:0", "--name", "a disk",
		"--control", control)
	endAll(t, control)
	rest, ok := strings.CutPrefix(uri, "nbd+vsock://")
	_, at, _ := strings.Cut(rest, ":")
	port, name, _ := strings.Cut(at, "/")
	if !ok || name != "a%20disk" {
		t.Fatalf("the URI is %s", uri)
	}
	uri = "nbd+vsock://1:" + at
	source := filepath.Join(t.TempDir(), "source")
	sh(t, "head -c 8M /dev/urandom >"+source+"; nbdcopy "+source+" '"+uri+"'")
	sh(t, "qemu-img compare --image-opts driver=raw,file.driver=file,file.filename="+source+
		" 'driver=nbd,export=a disk,server.type=vsock,server.cid=1,server.port="+port+"'")
	if r := nbdctl(t, "serve", "memory", "--size", "1M", "--listen", "vsock:"+port); r.code != 6 {
		t.Errorf("a second server at the same port: %d, %s", r.code, r.stderr)
	}
	load := loadClient(t, uri, nbd.Options{}, 0)
	for range 2 { // The second process has accepted none of its connections.
		load.goesOn(t)
		must(t, "upgrade", "--server", control)
	}
	load.goesOn(t)
	load.stop(t)
	sh(t, "nbdcopy "+source+" '"+uri+"'")
	ends(t, cmd, syscall.SIGTERM)
}
