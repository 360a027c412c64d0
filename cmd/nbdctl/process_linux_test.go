package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
)

// runCommand is what the test binary does in place of testing: it is nbdctl, or
// a worker of a test.
func runCommand() {
	run := churnRun
	rounds, err := strconv.Atoi(os.Getenv(churnWorker))
	if err != nil {
		run = servePool
		rounds, err = strconv.Atoi(os.Getenv(poolProgram))
	}
	if err != nil || len(os.Args) > 1 {
		main() // does not return
	}
	if err := run(rounds); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// ended tells whether the command ended with that code and has all these words on its standard
// error.
func (r result) ended(code exit.Code, words ...string) bool {
	return r.code == int(code) && containsAll(r.stderr, words...)
}

// containsAll tells whether s has all these words.
func containsAll(s string, words ...string) bool {
	return !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(s, w) })
}

// A lockedBuffer collects what a running command writes.
type lockedBuffer struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// await waits until the buffer contains text.
func (l *lockedBuffer) await(t testing.TB, text string) {
	t.Helper()
	eventually(t, func() bool { return strings.Contains(l.String(), text) }, "%q in the output", text)
}

// eventually waits until done says so: the end of something that another
// process or the kernel does and announces to nobody.
func eventually(t testing.TB, done func() bool, what string, args ...any) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	for !done() {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("waited in vain for "+what, args...)
		}
	}
}

// awaitNoServer waits until no process of the test serves a device any more.
func awaitNoServer(t testing.TB) {
	t.Helper()
	dir := os.Getenv("NBDCTL_STATE_DIR")
	eventually(t, func() bool { return len(serving(t, dir)) == 0 }, "the end of the serving process")
	eventually(t, func() bool { return len(named(t, dir, "nbdctl-keeper")) == 0 }, "the end of the keeper")
}

// interrupt sends what Ctrl-C sends.
func interrupt(t testing.TB, cmd *exec.Cmd) {
	t.Helper()
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
}

// hangs waits until a thread of the process waits in one of the functions of the kernel. If the
// process ends instead, or waits elsewhere, the failure says so.
func hangs(t testing.TB, pid int, ended <-chan result, functions ...string) {
	t.Helper()
	var stacks string
	defer func() {
		if t.Failed() {
			t.Logf("pid %d waits in:\n%s", pid, stacks)
		}
	}()
	eventually(t, func() bool {
		select {
		case r := <-ended:
			t.Fatalf("it ended with code %d: %s%s", r.code, r.stdout, r.stderr)
		default:
		}
		stacks = kernelStacks(t, pid)
		return slices.ContainsFunc(functions, func(f string) bool { return strings.Contains(stacks, f) })
	}, "pid %d to wait in one of %v", pid, functions)
}

// kernelStacks returns where the threads of a process are in the kernel.
func kernelStacks(t testing.TB, pid int) string {
	t.Helper()
	paths, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stack", pid))
	if err != nil {
		t.Fatal(err)
	}
	var all strings.Builder
	for _, path := range paths {
		stack, _ := os.ReadFile(path) // the thread may have ended
		fmt.Fprintf(&all, "%s\n", stack)
	}
	return all.String()
}
