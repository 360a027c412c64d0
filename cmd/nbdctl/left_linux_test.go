package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/nbdctl/nbdctl/backends/memory"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// poolProgram in the environment makes the test binary a program with a pool of that many devices,
// which it names and serves until it is killed.
const poolProgram = "NBDCTL_TEST_POOL"

func servePool(devices int) error {
	client, err := nbdnl.System{StateDir: os.Getenv("NBDCTL_STATE_DIR")}.NewClient()
	if err != nil {
		return err
	}
	pool, err := blockdev.NewPool(blockdev.PoolOptions{Name: "pool-test", Client: client})
	if err != nil {
		return err
	}
	for range devices {
		m, err := memory.New(1<<20, memory.Options{})
		if err != nil {
			return err
		}
		d, err := pool.Connect(context.Background(), m, blockdev.Options{})
		if err != nil {
			return err
		}
		fmt.Println(d.Path())
	}
	select {}
}

// pooled starts such a program, and returns it with its devices.
func pooled(t *testing.T, devices int) (*exec.Cmd, []string) {
	t.Helper()
	cmd := selfCommand(t, patience)
	cmd.Env = append(cmd.Env, poolProgram+"="+strconv.Itoa(devices))
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var paths []string
	for lines := bufio.NewScanner(out); len(paths) < devices && lines.Scan(); {
		paths = append(paths, lines.Text())
	}
	if len(paths) < devices {
		t.Fatalf("the program has %v and ends with %v", paths, cmd.Wait())
	}
	return cmd, paths
}

// TestKernelLeft kills a program with a pool. Its devices are live until then and orphaned from
// then on, as far as that can be known, and nbdctl does not take them unasked.
func TestKernelLeft(t *testing.T) {
	requireKernel(t, `I/O error|Connection timed out|Dead connection|Send disconnect failed|Receive control failed`)
	nbdnltest.Identifiers.Need(t)
	t.Cleanup(func() { os.RemoveAll(filepath.Join(os.Getenv("NBDCTL_STATE_DIR"), "leases")) })
	program, paths := pooled(t, 2)
	check := func(want string) {
		t.Helper()
		for _, dev := range paths {
			l := listed(t, dev)
			if l == nil || l["state"] != want || l["owner"].(map[string]any)["ours"] != false {
				t.Errorf("list shows %v, want it %s", l, want)
			}
			if s := statusOf(t, dev); s["state"] != want {
				t.Errorf("status shows it %s, want %s", s["state"], want)
			}
		}
	}
	check("live")
	if err := program.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	var status *exec.ExitError
	if err := program.Wait(); !errors.As(err, &status) {
		t.Fatal(err)
	}
	check("orphaned")
	if l := nbdctl(t, "list"); !containsAll(l.stderr, "orphaned", "disconnect --force "+filepath.Base(paths[0])) {
		t.Errorf("list does not explain: %q", l.stderr)
	}
	// Without privilege a lease can't be read, and that the process has ended is not known.
	r := finish(t, commandAs(t, nobody, "list", "--json"))
	if r.code != 0 || !strings.Contains(r.stdout, `"live"`) || strings.Contains(r.stdout, "orphaned") {
		t.Errorf("without privilege: exit code %d, %s", r.code, r.stdout)
	}
	if r := nbdctl(t, "disconnect", paths[0]); !r.ended(exit.Permission, "a program that has ended") {
		t.Errorf("disconnect: exit code %d, %s", r.code, r.stderr)
	}
	must(t, "disconnect", "--all") // which are ours only
	check("orphaned")
	for _, dev := range paths {
		r := nbdctl(t, "disconnect", "--force", dev)
		if r.code != 0 || r.stderr != "" {
			t.Errorf("disconnect --force: exit code %d, %s", r.code, r.stderr)
		}
		if l := listed(t, dev); l != nil {
			t.Errorf("list shows %v", l)
		}
	}
}

// TestKernelLeftIndex connects another program's device on an index that a killed pool has left
// free: nothing says that it has ended.
func TestKernelLeftIndex(t *testing.T) {
	requireKernel(t, `I/O error|Connection timed out|Dead connection|Send disconnect failed|Receive control failed`)
	nbdnltest.Identifiers.Need(t)
	t.Cleanup(func() { os.RemoveAll(filepath.Join(os.Getenv("NBDCTL_STATE_DIR"), "leases")) })
	program, paths := pooled(t, 1)
	if err := errors.Join(program.Process.Kill(), ignoreExit(program.Wait())); err != nil {
		t.Fatal(err)
	}
	must(t, "disconnect", "--force", paths[0]) // leaves the lease
	b, err := memory.New(1<<20, memory.Options{})
	if err != nil {
		t.Fatal(err)
	}
	index, err := strconv.Atoi(strings.TrimPrefix(paths[0], "/dev/nbd"))
	if err != nil {
		t.Fatal(err)
	}
	d, err := blockdev.ConnectIndex(t.Context(), index, b, blockdev.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if l := listed(t, d.Path()); l == nil || l["state"] != "live" {
		t.Errorf("list shows %v", l)
	}
	if err := errors.Join(d.Close(), b.Close()); err != nil {
		t.Error(err)
	}
}

// ignoreExit leaves out that a command did not succeed.
func ignoreExit(err error) error {
	if errors.As(err, new(*exec.ExitError)) {
		return nil
	}
	return err
}
