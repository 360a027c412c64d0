package host

import (
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestCut shows that what has no name is shut down, and nothing else.
func TestCut(t *testing.T) {
	dir := t.TempDir()
	l, err := os.Create(filepath.Join(dir, "lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := lock(l); err != nil {
		t.Fatal(err)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	kernel, server := os.NewFile(uintptr(pair[0]), "kernel"), os.NewFile(uintptr(pair[1]), "server")
	defer kernel.Close()
	defer server.Close()
	listener, err := net.Listen("unix", filepath.Join(dir, "ctl"))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	asker, err := net.Dial("unix", filepath.Join(dir, "ctl"))
	if err != nil {
		t.Fatal(err)
	}
	defer asker.Close()
	asked, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer asked.Close()

	r := newRecord(uuidA, "")
	r.PID = os.Getpid()
	e := Entry{Record: r, Alive: true, dir: dir}
	if err := e.Cut(); err != nil {
		t.Fatal(err)
	}
	if n, err := kernel.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("the kernel's end reads %d, %v", n, err)
	}
	if _, err := asker.Write([]byte("status")); err != nil {
		t.Errorf("an asker was cut off: %v", err)
	}
	if n, err := asked.Read(make([]byte, 16)); n != 6 || err != nil {
		t.Errorf("an asker was cut off: %d, %v", n, err)
	}
}

// TestCutStranger shows that a number that means another process here, as it
// does outside of a container, is nobody's death.
func TestCutStranger(t *testing.T) {
	dir := t.TempDir()
	l, err := os.Create(filepath.Join(dir, "lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := lock(l); err != nil {
		t.Fatal(err)
	}
	stranger := exec.CommandContext(t.Context(), "sleep", "100")
	if err := stranger.Start(); err != nil {
		t.Fatal(err)
	}
	r := newRecord(uuidA, "")
	r.PID = stranger.Process.Pid
	e := Entry{Record: r, Alive: true, dir: dir}
	if err := e.Kill(t.Context()); err == nil || !strings.Contains(err.Error(), "container") {
		t.Errorf("Kill: %v", err)
	}
	if err := e.Cut(); err == nil {
		t.Error("Cut finds something to cut")
	}
	if err := stranger.Process.Signal(syscall.SIGTERM); err != nil {
		t.Errorf("the stranger is dead: %v", err)
	}
	_ = stranger.Wait()
	if got := stranger.ProcessState.Sys().(syscall.WaitStatus).Signal(); got != syscall.SIGTERM {
		t.Errorf("the stranger died of %s", got)
	}
}
