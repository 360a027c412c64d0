package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/backends/memory"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"github.com/nbdctl/nbdctl/server"
)

// stranger connects a device as another program would, and disconnects it
// when the test ends. It returns the device's path.
func stranger(t *testing.T) string {
	t.Helper()
	m, err := memory.New(1<<20, memory.Options{})
	if err != nil {
		t.Fatal(err)
	}
	export, err := server.NewExport(m, server.Options{})
	if err != nil {
		t.Fatal(err)
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		if ends[i], err = net.FileConn(f); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	conn := export.NewConn(ends[0], nil)
	served := make(chan error, 1)
	go func() { served <- conn.Transmit() }()
	client, err := nbdnl.New()
	if err != nil {
		t.Fatal(err)
	}
	const identifier = "stranger:1"
	index, err := client.Connect(t.Context(), nbdnl.Config{
		Sockets:    []syscall.Conn{ends[1].(*net.UnixConn)},
		Size:       export.Size(),
		BlockSize:  512,
		Flags:      nbdnl.Flags(export.Flags()),
		Timeout:    30e9,
		Identifier: identifier,
	})
	if err != nil {
		t.Fatal(err)
	}
	ends[1].Close()
	ctx := context.WithoutCancel(t.Context())
	t.Cleanup(func() {
		st, err := client.Status(ctx, index)
		// Where no identifiers are kept nothing but the test disconnects it.
		ours := st.Identifier == identifier || !st.HasIdentifier
		if err == nil && st.Connected() && ours {
			if err := client.DropAny(ctx, index); err != nil {
				t.Error(err)
			}
		}
		if err := <-served; err != nil {
			t.Error(err)
		}
		conn.Close()
		client.Close()
		m.Close()
	})
	return nbdnl.Path(index)
}

// TestKernelStrangers shows that a device of another program is listed as not
// ours and not disconnected, unless it is named and forced.
func TestKernelStrangers(t *testing.T) {
	requireKernel(t)
	dev := stranger(t)
	d := listed(t, dev)
	var pid, identifier any = float64(os.Getpid()), "stranger:1"
	shown := fmt.Sprint(os.Getpid())
	if !nbdnltest.Identifiers.In(t) {
		pid, identifier, shown = nil, nil, "" // Linux 5.10, which must not be asked for the owner either.
	}
	if owner := d["owner"].(map[string]any); owner["ours"] != false || owner["pid"] != pid {
		t.Errorf("the owner is %v, want not ours and pid %v", owner, pid)
	}
	if d["identifier"] != identifier || d["backend"] != nil || d["since"] != nil {
		t.Errorf("list shows %v", d)
	}
	if out := must(t, "list"); pid != nil && !strings.Contains(out, "not ours") {
		t.Errorf("list shows\n%s", out)
	}
	r := nbdctl(t, "disconnect", dev)
	if !r.ended(exit.Permission, "not ours", shown) {
		t.Errorf("disconnect: code %d, %q", r.code, r.stderr)
	}
	for _, all := range [][]string{{"disconnect", "--all"}, {"disconnect", "--all", "--force"}} {
		if must(t, all...); listed(t, dev) == nil {
			t.Fatalf("%v took a stranger's device", all)
		}
	}
	must(t, "disconnect", "--force", dev)
	if listed(t, dev) != nil {
		t.Error("a forced disconnect by name leaves it")
	}
}

// TestKernelQemuNBD is the same for a device that qemu-nbd connected by ioctl.
func TestKernelQemuNBD(t *testing.T) {
	requireKernel(t)
	mode, who := any("ioctl"), "qemu-nbd"
	if !nbdnltest.Identifiers.In(t) { // Such a kernel tells neither how a stranger's device was connected nor by whom.
		mode, who = nil, "another program"
	}
	image := filepath.Join(imageDir(t), "disk.img")
	sh(t, "truncate -s 1M "+image+"; qemu-nbd --fork -f raw -c /dev/nbd7 "+image)
	eventually(t, func() bool { return listed(t, "/dev/nbd7") != nil }, "nbd7 connected by qemu-nbd")
	if d := listed(t, "/dev/nbd7"); d["mode"] != mode || d["owner"].(map[string]any)["ours"] != false {
		t.Errorf("list shows %v", d)
	}
	if r := nbdctl(t, "disconnect", "nbd7"); r.code != int(exit.Permission) || !strings.Contains(r.stderr, who) {
		t.Errorf("disconnect: code %d, %q", r.code, r.stderr)
	}
	sh(t, "qemu-nbd -d /dev/nbd7 >/dev/null")
	eventually(t, func() bool { return listed(t, "/dev/nbd7") == nil }, "nbd7 free")
}
