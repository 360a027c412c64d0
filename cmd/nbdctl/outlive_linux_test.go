package main

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// inShell has a shell run script in place of cmd, which is "$@" there.
func inShell(cmd *exec.Cmd, script string) *exec.Cmd {
	cmd.Args = append([]string{"sh", "-c", script, "sh", cmd.Path}, cmd.Args[1:]...)
	cmd.Path = "/bin/sh"
	return cmd
}

// ignored tells which of the signals the process ignores.
func ignored(t testing.TB, pid int, signals ...syscall.Signal) (found []syscall.Signal) {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		hex, ok := strings.CutPrefix(line, "SigIgn:")
		if !ok {
			continue
		}
		mask, err := strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range signals {
			if mask&(1<<(s-1)) != 0 {
				found = append(found, s)
			}
		}
	}
	return found
}

// started runs cmd and returns the first line that it prints: of a serve, the URI.
func started(t testing.TB, cmd *exec.Cmd) string {
	t.Helper()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if cmd.Stderr == nil {
		cmd.Stderr = new(lockedBuffer)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("%v: %s", err, cmd.Stderr)
	}
	return strings.TrimSpace(line)
}

// ends asks a serve to end and waits for it. It must succeed.
func ends(t testing.TB, cmd *exec.Cmd, s syscall.Signal) {
	t.Helper()
	if err := cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("after %v: %v", s, err)
	}
}

// TestServeIgnored holds that a server heeds the signals that ask it to end, but for
// those that were ignored when it was started: under nohup the terminal's hang-up, in
// the background of a script its Ctrl-C.
func TestServeIgnored(t *testing.T) {
	all := []syscall.Signal{syscall.SIGHUP, syscall.SIGINT}
	for _, tt := range []struct {
		script string
		ignore []syscall.Signal
	}{
		{`exec "$@"`, nil},
		{`trap "" HUP; exec "$@"`, all[:1]},
		{`trap "" INT; exec "$@"`, all[1:]},
		{`trap "" HUP INT; exec "$@"`, all},
	} {
		for _, s := range append(all, syscall.SIGTERM) {
			serve := nbdctlCommand(t, "serve", "memory", "--size", "1M", "--listen", "tcp:127.0.0.1:0")
			cmd := inShell(serve, tt.script)
			uri := started(t, cmd)
			if got := ignored(t, cmd.Process.Pid, all...); fmt.Sprint(got) != fmt.Sprint(tt.ignore) {
				t.Errorf("%s: ignores %v, want %v", tt.script, got, tt.ignore)
			}
			for _, ignored := range tt.ignore {
				if s == ignored {
					if err := cmd.Process.Signal(s); err != nil {
						t.Fatal(err)
					}
					dial(t, uri)
					s = syscall.SIGTERM
				}
			}
			ends(t, cmd, s)
		}
	}
}

// A terminal is a pseudo-terminal for a session to have.
type terminal struct{ master, slave *os.File }

func openTerminal(t testing.TB) terminal {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skip(err)
	}
	fd := int(master.Fd())
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close(); slave.Close() })
	return terminal{master, slave}
}

// lead makes cmd the leader of a session on the terminal.
func (tty terminal) lead(cmd *exec.Cmd) {
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty.slave, tty.slave, tty.slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
}

// hangUp is what becomes of a terminal whose window is closed: a SIGHUP for who is on
// it, and an error for who reads or writes it from then on.
func (tty terminal) hangUp(t testing.TB) {
	t.Helper()
	if err := tty.slave.Close(); err != nil {
		t.Fatal(err)
	}
	if err := tty.master.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestServeTerminal holds that a server under nohup outlives its terminal, into which
// it still writes its log, and that any other ends with it in order.
func TestServeTerminal(t *testing.T) {
	dir := shortDir(t)
	for _, ignore := range []string{"", `trap "" HUP; `} {
		tty := openTerminal(t)
		socket := filepath.Join(dir, "s")
		serve := nbdctlCommand(t, "serve", "memory", "--size", "1M", "--listen", "unix:"+socket)
		cmd := inShell(serve, ignore+`exec "$@"`)
		tty.lead(cmd)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		uri, err := bufio.NewReader(tty.master).ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		tty.hangUp(t)
		if ignore != "" {
			dial(t, strings.TrimSpace(uri)).nc.Close()
			if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("%q: %v", ignore, err)
		}
		if _, err := os.Lstat(socket); !os.IsNotExist(err) {
			t.Errorf("%q: its socket stays: %v", ignore, err)
		}
	}
}

// shortDir is a directory in which the path of a socket is not too long.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// TestServeSurroundings holds that a server needs nothing of who started it: neither
// open descriptors nor a working directory.
func TestServeSurroundings(t *testing.T) {
	for _, script := range []string{
		`exec "$@" <&- >&- 2>&-`,
		`exec "$@" <&-`,
		`mkdir gone; cd gone; rmdir ../gone; exec "$@"`,
		`"$@" & echo $! >pid; exit 0`,
	} {
		dir := shortDir(t)
		socket, image := filepath.Join(dir, "s"), filepath.Join(dir, "disk.img")
		serve := nbdctlCommand(t, "serve", "file", image, "--create", "--size", "1M", "--listen", "unix:"+socket)
		cmd := inShell(serve, script)
		cmd.Dir = dir
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		pid := cmd.Process.Pid
		if strings.Contains(script, "exit") {
			if err := cmd.Wait(); err != nil {
				t.Fatal(err)
			}
			var err error
			if pid, err = strconv.Atoi(sh(t, "cat "+dir+"/pid")); err != nil {
				t.Fatal(err)
			}
		}
		var c *client
		eventually(t, func() (ok bool) {
			var err error
			c, err = dialURI("nbd+unix:///?socket=" + socket)
			return err == nil
		}, "%s: a server", script)
		if _, errno, err := c.do(1, 4096, 4, []byte("data")); errno != 0 || err != nil {
			t.Errorf("%s: write: %d, %v", script, errno, err)
		}
		c.nc.Close()
		if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		eventually(t, func() bool { _, err := os.Lstat(socket); return err != nil }, "%s: its end", script)
		if pid == cmd.Process.Pid {
			if err := cmd.Wait(); err != nil {
				t.Errorf("%s: %v", script, err)
			}
		}
		if b, err := os.ReadFile(image); err != nil || len(b) != 1<<20 || string(b[4096:4100]) != "data" {
			t.Errorf("%s: the image has %d bytes, %v", script, len(b), err)
		}
	}
}
