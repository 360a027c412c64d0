package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
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

// interrupt sends what Ctrl-C sends.
func interrupt(t testing.TB, cmd *exec.Cmd) {
	t.Helper()
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
}
