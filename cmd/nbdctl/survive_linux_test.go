package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
)

// TestKernelSurvives holds that a device lives on whatever becomes of who connected
// it, and that its process heeds no signal that was ignored then.
func TestKernelSurvives(t *testing.T) {
	requireKernel(t)
	for _, tt := range []struct {
		script string
		ignore []syscall.Signal
	}{
		{`"$@"`, nil},
		{`trap "" HUP; exec "$@"`, []syscall.Signal{syscall.SIGHUP}},
		{`trap "" HUP INT; exec "$@"`, []syscall.Signal{syscall.SIGHUP, syscall.SIGINT}},
		{`"$@" & wait $!`, []syscall.Signal{syscall.SIGINT}}, // as POSIX has it of a shell without job control
		{`exec "$@" <&- >&- 2>&-`, nil},
		{`mkdir gone; cd gone; rmdir ../gone; exec "$@"`, nil},
	} {
		cmd := inShell(nbdctlCommand(t, "connect", "memory", "--size", "1M", "--name", "survivor"), tt.script)
		cmd.Dir = t.TempDir()
		if r := finish(t, cmd); r.code != int(exit.OK) {
			t.Fatalf("%s: exit code %d, %s", tt.script, r.code, r.stderr)
		}
		d := statusOf(t, "survivor")
		dev, pid := d["path"].(string), int(d["owner"].(map[string]any)["pid"].(float64))
		got := ignored(t, pid, syscall.SIGHUP, syscall.SIGINT)
		if fmt.Sprint(got) != fmt.Sprint(tt.ignore) {
			t.Errorf("%s: the process ignores %v, want %v", tt.script, got, tt.ignore)
		}
		for _, s := range got {
			if err := syscall.Kill(pid, s); err != nil {
				t.Fatal(err)
			}
		}
		if d := listed(t, dev); d == nil || d["state"] != "live" {
			t.Errorf("%s: list shows %v", tt.script, d)
		}
		sh(t, "dd if="+dev+" of=/dev/null bs=64k count=1 iflag=direct status=none")
		if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		eventually(t, func() bool { return listed(t, dev) == nil }, "%s: the end of %s", tt.script, dev)
	}
}

// TestKernelTerminalClosed holds that a device outlives the terminal, and the session,
// in which it was connected.
func TestKernelTerminalClosed(t *testing.T) {
	requireKernel(t)
	tty := openTerminal(t)
	cmd := inShell(nbdctlCommand(t, "connect", "memory", "--size", "1M"), `"$@"; read line`)
	tty.lead(cmd)
	// A pipe that who runs in the session has open, which the serving process does not.
	ended, open, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer ended.Close()
	cmd.ExtraFiles = []*os.File{open}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	open.Close()
	dev, err := bufio.NewReader(tty.master).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	dev = strings.TrimSpace(dev)
	tty.hangUp(t)
	_ = cmd.Wait() // The shell ends by the signal, or at the end of its input.
	if _, err := io.ReadAll(ended); err != nil {
		t.Fatal(err)
	}
	if d := listed(t, dev); d == nil || d["state"] != "live" {
		t.Errorf("list shows %v", d)
	}
	sh(t, "dd if=/dev/zero of="+dev+" bs=64k count=1 oflag=direct status=none")
	must(t, "disconnect", dev)
}

// TestKernelWatchIgnored holds that a command does not take over what was ignored.
func TestKernelWatchIgnored(t *testing.T) {
	requireKernel(t)
	connected(t, "memory", "--size", "1M")
	cmd := inShell(nbdctlCommand(t, "watch"), `trap "" INT; exec "$@"`)
	started(t, cmd)
	if len(ignored(t, cmd.Process.Pid, syscall.SIGINT)) == 0 {
		t.Error("SIGINT is taken over")
	}
	ends(t, cmd, syscall.SIGTERM)
}
