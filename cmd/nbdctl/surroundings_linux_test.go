package main

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
)

// TestKernelInheritsNothing shows that the serving process has nothing of who
// started it: no open file, no umask, no working directory.
func TestKernelInheritsNothing(t *testing.T) {
	requireKernel(t)
	lock, err := os.Create(filepath.Join(t.TempDir(), "lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	cmd := nbdctlCommand(t, "connect", "memory", "--size", "1M")
	cmd.Args = append([]string{"sh", "-c", `umask 077; exec "$0" "$@"`, cmd.Path}, cmd.Args[1:]...)
	cmd.Path = "/bin/sh"
	cmd.Dir = t.TempDir()
	cmd.ExtraFiles = []*os.File{lock}
	r := finish(t, cmd)
	if r.code != 0 {
		t.Fatalf("code %d: %s", r.code, r.stderr)
	}
	dev := strings.TrimSpace(r.stdout)
	defer must(t, "disconnect", dev)
	proc := fmt.Sprintf("/proc/%.0f/", listed(t, dev)["owner"].(map[string]any)["pid"])
	fds, err := filepath.Glob(proc + "fd/*")
	if err != nil || len(fds) == 0 {
		t.Fatal(fds, err)
	}
	for _, fd := range fds {
		if to, _ := os.Readlink(fd); to == lock.Name() || strings.HasPrefix(to, "pipe:") {
			t.Errorf("the serving process has %s open", to)
		}
	}
	if cwd, _ := os.Readlink(proc + "cwd"); cwd != "/" {
		t.Errorf("the serving process sits in %s", cwd)
	}
	err = filepath.WalkDir(os.Getenv("NBDCTL_STATE_DIR"), func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		st, err := d.Info()
		private := filepath.Base(path) == "ctl" || filepath.Base(filepath.Dir(path)) == "claims"
		if err == nil && !private && st.Mode().Perm()&0o044 != 0o044 {
			t.Errorf("%s has mode %v: not everybody can list", path, st.Mode())
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// TestKernelOutputLost shows that a connect whose user does not get to know
// the device leaves none.
func TestKernelOutputLost(t *testing.T) {
	requireKernel(t)
	self := nbdctlCommand(t).Path
	for _, line := range []string{
		"connect memory --size 1M >/dev/full",
		"connect memory --size 1M --json >/dev/full",
		"connect memory --size 1M | true",
	} {
		cmd := command(t, "bash", "-c", "set -o pipefail; "+self+" "+line)
		cmd.Env = append(os.Environ(), runAsNbdctl+"=1")
		if r := finish(t, cmd); r.code != int(exit.Failure) || !strings.Contains(r.stderr, "nbdctl: ") {
			// A pipe may be read by nobody only after the path was written to it.
			if !strings.HasSuffix(line, "| true") || r.code != 0 {
				t.Errorf("%s: code %d, %s", line, r.code, r.stderr)
			} else {
				must(t, "disconnect", "--all")
			}
		}
		if d := listJSON(t); len(d) != 0 {
			t.Errorf("%s: left %v", line, d)
			must(t, "disconnect", "--all")
		}
	}
}

// TestKernelTerminalLost shows that a foreground process that serves a held
// device outlives the terminal and whoever read its messages.
func TestKernelTerminalLost(t *testing.T) {
	requireKernel(t)
	cmd := nbdctlCommand(t, "connect", "--foreground", "memory", "--size", "1M")
	out, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = in, in
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	in.Close()
	// Who can't tell of the device that it has made takes it back.
	dev := ""
	for lines := bufio.NewScanner(out); !strings.HasPrefix(dev, "/dev/"); dev = lines.Text() {
		if !lines.Scan() {
			t.Fatal("the device was not told")
		}
	}
	holder, err := os.Open(dev)
	if err != nil {
		t.Fatal(err)
	}
	defer holder.Close()
	out.Close()
	log, ok := statusOf(t, dev)["log"].(string)
	if !ok {
		t.Fatalf("%s is not ours: %v", dev, statusOf(t, dev))
	}
	for i, s := range []os.Signal{syscall.SIGHUP, syscall.SIGTERM, syscall.SIGTERM} {
		if err := cmd.Process.Signal(s); err != nil {
			t.Fatal(err)
		}
		refused := func() bool { return strings.Count(sh(t, "cat "+log), "goes on serving") == i+1 }
		eventually(t, refused, "refusal %d", i+1)
	}
	if d := listed(t, dev); d["state"] != "live" {
		t.Errorf("list shows %v", d)
	}
	holder.Close()
	if err := cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}
