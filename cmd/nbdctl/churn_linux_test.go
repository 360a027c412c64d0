package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

const (
	// churnRounds is how often TestKernelChurn connects and disconnects.
	churnRounds = 200
	// churnTime is how long that may take; on a slow machine there are fewer rounds then, but
	// churnLeast at least.
	churnTime  = time.Minute
	churnLeast = 20
	// churnPatience bounds it, on a lab that shares its processor with others.
	churnPatience = 8 * time.Minute
)

// TestKernelChurn connects and disconnects from two processes at once. None
// may fail or hang, and nothing may be left, memory included.
func TestKernelChurn(t *testing.T) {
	requireKernel(t)
	churn(t)
}

// TestKernelChurnUdev is the same beside a real systemd-udevd, which opens
// every device that appears or changes.
func TestKernelChurnUdev(t *testing.T) {
	udevd, err := filepath.Abs("../../testdata/lab/udevd")
	if err != nil {
		t.Fatal(err)
	}
	// A prober that comes as the device ends gets to know.
	requireKernel(t, `I/O error, dev nbd\d+, sector \d+ op 0x0:\(READ\)`,
		`Buffer I/O error on dev nbd\d+, logical block \d+, async page read`)
	sh(t, udevd+" start")
	defer sh(t, udevd+" stop")
	churn(t)
	sh(t, "udevadm settle")
}

// churnTimes is how long each round of a worker took.
type churnTimes struct{ Connect, Disconnect []time.Duration }

// churnWorker in the environment makes the test binary one of the processes
// of churn, for so many rounds.
const churnWorker = "NBDCTL_TEST_CHURN"

func churn(t *testing.T) {
	t.Helper()
	churnWork(t, 6) // What is only ever loaded once, the workers of udevd included, is there then.
	before := available(t)
	for range 3 { // It moves by some while nothing happens.
		<-time.After(time.Second)
		before = min(before, available(t))
	}
	all := churnWork(t, churnRounds)
	for name, d := range map[string][]time.Duration{"connects": all.Connect, "disconnects": all.Disconnect} {
		if len(d) < churnLeast {
			t.Fatalf("%d of at least %d %s", len(d), churnLeast, name)
		}
		slices.Sort(d)
		median, worst := d[len(d)/2].Round(time.Microsecond), d[len(d)-1].Round(time.Microsecond)
		t.Logf("%d %s: median %s, worst %s", len(d), name, median, worst)
	}
	// One megabyte a round would be lost. What the kernel itself keeps moves by some.
	rounds := len(all.Connect)
	lost, limit := before-available(t), max(20<<10, rounds<<10/2)
	t.Logf("%d KiB of memory are gone in %d rounds", lost, rounds)
	// What the kernel frees late comes back, and what is lost does not.
	for range 30 {
		if lost <= limit {
			break
		}
		<-time.After(time.Second)
		lost = before - available(t)
	}
	if lost > limit {
		t.Logf("%d KiB still are", lost)
		t.Errorf("that is too much")
	}
}

// churnWork connects and disconnects from two processes at once.
func churnWork(t *testing.T, rounds int) (all churnTimes) {
	t.Helper()
	results := make(chan result)
	for range 2 {
		worker := selfCommand(t, churnPatience)
		worker.Env = append(worker.Env, churnWorker+"="+strconv.Itoa(rounds/2))
		go func() { results <- finish(t, worker) }()
	}
	for range 2 {
		r := <-results
		var times churnTimes
		if err := json.Unmarshal([]byte(r.stdout), &times); err != nil || r.code != 0 {
			t.Errorf("code %d, %v: %s", r.code, err, r.stderr)
		}
		all.Connect = append(all.Connect, times.Connect...)
		all.Disconnect = append(all.Disconnect, times.Disconnect...)
	}
	return all
}

// available is the memory that the machine has to offer, in KiB.
func available(t *testing.T) int {
	t.Helper()
	awaitNoServer(t) // They are there for a moment longer than their devices, with keepers.
	n, err := strconv.Atoi(sh(t, "echo 3 >/proc/sys/vm/drop_caches; awk '/^MemAvailable/ {print $2}' /proc/meminfo"))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// churnRun connects, writes, and disconnects, for so many rounds, or for churnTime, by nbdctl's
// commands, each with a serving process of its own. Starting nbdctl for every
// command would mostly measure that.
func churnRun(rounds int) error {
	signal.Ignore(syscall.SIGCHLD) // for the serving processes to leave no zombies
	var times churnTimes
	block := make([]byte, 4096)
	began := time.Now()
	for i := range rounds {
		var stdout, stderr bytes.Buffer
		start := time.Now()
		if i >= churnLeast/2 && start.Sub(began) > churnTime {
			break
		}
		connect := []string{"connect", "memory", "--size", "64M"}
		if code := run(context.Background(), connect, &stdout, &stderr); code != exit.OK {
			return fmt.Errorf("connect: code %d: %s", code, &stderr)
		}
		times.Connect = append(times.Connect, time.Since(start))
		dev := strings.TrimSpace(stdout.String())
		f, err := os.OpenFile(dev, os.O_WRONLY|os.O_SYNC, 0)
		if err != nil {
			return err
		}
		_, err = f.Write(block)
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
		start = time.Now()
		if code := run(context.Background(), []string{"disconnect", dev}, &stdout, &stderr); code != exit.OK {
			return fmt.Errorf("disconnect %s: code %d: %s", dev, code, &stderr)
		}
		times.Disconnect = append(times.Disconnect, time.Since(start))
	}
	return json.NewEncoder(os.Stdout).Encode(times)
}

// TestKernelTwoDisconnects shows that of two at once one disconnects, and the
// other says clearly that there is nothing left to do, or does no harm.
func TestKernelTwoDisconnects(t *testing.T) {
	requireKernel(t)
	for range 5 {
		dev := connected(t, "memory", "--size", "1M")
		results := make(chan result)
		for range 2 {
			go func() { results <- finish(t, nbdctlCommand(t, "disconnect", dev)) }()
		}
		succeeded := 0
		for range 2 {
			switch r := <-results; r.code {
			case int(exit.OK):
				succeeded++
			case int(exit.NotFound):
				if !strings.Contains(r.stderr, "not connected") {
					t.Errorf("the loser says %q", r.stderr)
				}
			default:
				t.Errorf("code %d: %s", r.code, r.stderr)
			}
		}
		if succeeded != 1 {
			t.Errorf("%d of two disconnects succeeded", succeeded)
		}
	}
}

// TestKernelTwoDisconnectAll shows that two who want everything gone both get it.
func TestKernelTwoDisconnectAll(t *testing.T) {
	requireKernel(t)
	connected(t, "memory", "--size", "1M")
	connected(t, "memory", "--size", "1M")
	results := make(chan result)
	for range 2 {
		go func() { results <- finish(t, nbdctlCommand(t, "disconnect", "--all")) }()
	}
	for range 2 {
		if r := <-results; r.code != int(exit.OK) {
			t.Errorf("code %d: %s", r.code, r.stderr)
		}
	}
}

// TestKernelDisconnectDuringConnect shows that either the connect wins and
// the disconnect follows, or the disconnect finds nothing, or it comes in
// between and both say so.
func TestKernelDisconnectDuringConnect(t *testing.T) {
	requireKernel(t)
	for i := range 8 {
		connect := nbdctlCommand(t, "connect", "memory", "--size", "1M", "--device", "nbd3", "--name", "racer")
		done := make(chan result)
		go func() { done <- finish(t, connect) }()
		// Asked in ever other moments of the connect, until it succeeds.
		codes := map[int]bool{}
		for {
			r := nbdctl(t, "disconnect", "nbd3")
			codes[r.code] = true
			if r.code == int(exit.OK) {
				break
			}
			// Without an identifier it is a stranger's for as long as connect has not written down
			// that it is not.
			early := r.code == int(exit.Permission) && !nbdnltest.Identifiers.In(t)
			if r.code != int(exit.NotFound) && r.code != int(exit.Busy) && !early {
				t.Fatalf("round %d: disconnect: code %d, %s", i, r.code, r.stderr)
			}
		}
		r := <-done
		between := r.ended(exit.NotFound, "/dev/nbd3 was disconnected before it was ready")
		if !between && (r.code != int(exit.OK) || r.stdout != "/dev/nbd3\n") {
			t.Errorf("round %d: connect: code %d, %q, %s", i, r.code, r.stdout, r.stderr)
		}
		if d := listed(t, "/dev/nbd3"); d != nil {
			t.Errorf("round %d: left: %v", i, d)
		}
	}
}

// TestKernelInterruptedConnect interrupts connect at many moments, until well
// after it is done: there is either a device, whose path was printed and which
// succeeded, or nothing.
func TestKernelInterruptedConnect(t *testing.T) {
	requireKernel(t, `I/O error`) // of a partition scan that the end cuts short
	const rounds = 24
	image := filepath.Join(imageDir(t), "new.img")
	began := time.Now()
	dev := connected(t, "file", image, "--create", "--size", "1M")
	step := max(25*time.Millisecond, 3*time.Since(began)/2/rounds) // The machine may be busy.
	must(t, "disconnect", dev)
	sh(t, "rm "+image)
	undone := 0
	for i := range rounds {
		cmd := nbdctlCommand(t, "connect", "file", image, "--create", "--size", "1M")
		var stdout, stderr lockedBuffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		timer := time.AfterFunc(time.Duration(i)*step, func() { _ = cmd.Process.Signal(os.Interrupt) })
		err := cmd.Wait()
		timer.Stop()
		if dev := strings.TrimSpace(stdout.String()); err == nil && dev != "" {
			must(t, "disconnect", dev)
			sh(t, "rm "+image)
			continue
		} else if dev != "" {
			t.Errorf("after %s: printed %q and failed: %v, %s", time.Duration(i)*step, dev, err, stderr.String())
		}
		undone++
		if left := listJSON(t); len(left) != 0 {
			t.Fatalf("after %s: left %v: %v, %s", time.Duration(i)*step, left, err, stderr.String())
		}
		if _, err := os.Stat(image); err == nil {
			t.Errorf("after %s: left the image that it created: %s", time.Duration(i)*step, stderr.String())
			sh(t, "rm "+image)
		}
	}
	t.Logf("%d of %d were interrupted before they were done", undone, rounds)
	if undone == 0 || undone == rounds {
		t.Error("the interrupts all came too early, or all too late")
	}
}

// TestKernelConnectUnread stops connect where its device is ready but its user
// does not know yet, because nobody reads what it prints. If connect then
// dies, or cannot print, nothing is left; a mere Ctrl-C comes too late.
func TestKernelConnectUnread(t *testing.T) {
	requireKernel(t, `I/O error`)
	image := filepath.Join(imageDir(t), "new.img")
	for _, tt := range []struct {
		name string
		do   func(cmd *exec.Cmd, reader *os.File)
		code int
		left bool
	}{
		{"killed", func(cmd *exec.Cmd, _ *os.File) { cmd.Process.Kill() }, -1, false},
		{"reader gone", func(_ *exec.Cmd, reader *os.File) { reader.Close() }, int(exit.Failure), false},
		{"interrupted", func(cmd *exec.Cmd, reader *os.File) {
			cmd.Process.Signal(os.Interrupt)
			io.Copy(io.Discard, io.LimitReader(reader, 1<<16))
		}, int(exit.OK), true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			// Not one byte more goes into the pipe.
			for n := 1; n > 0; {
				if err := w.SetWriteDeadline(time.Now().Add(time.Second)); err != nil {
					t.Fatal(err)
				}
				if n, err = w.Write(make([]byte, 1<<20)); !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Fatal(err)
				}
			}
			cmd := nbdctlCommand(t, "connect", "file", image, "--create", "--size", "1M")
			cmd.Stdout = w
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			w.Close()
			hangs(t, cmd.Process.Pid, nil, "pipe_write")
			if d := listJSON(t); len(d) != 1 {
				t.Fatalf("connected: %v", d)
			}
			tt.do(cmd, r)
			if cmd.Wait(); cmd.ProcessState.ExitCode() != tt.code {
				t.Errorf("ended with %s, want code %d", cmd.ProcessState, tt.code)
			}
			if tt.left {
				must(t, "disconnect", "nbd0")
				sh(t, "rm "+image)
				return
			}
			dir := os.Getenv("NBDCTL_STATE_DIR")
			ended := func() bool { return len(listJSON(t))+len(serving(t, dir)) == 0 }
			eventually(t, ended, "the end of device and process")
			if _, err := os.Stat(image); err == nil {
				t.Error("the image that it created is still there")
			}
		})
	}
}
