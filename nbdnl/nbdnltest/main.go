package nbdnltest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
)

// requireEnv, set to 1, makes a test fail that would be skipped for want of a kernel.
const requireEnv = "NBD_TEST_REQUIRE"

// RequireKernel skips the test, with the reason, when there is no NBD driver that it could use.
// Where the environment variable NBD_TEST_REQUIRE is 1 the test fails instead. At its end a test
// fails that has left connected devices of this process.
func RequireKernel(t testing.TB) {
	t.Helper()
	require(t, kernelUsable())
	wantNoDeviceLeft(t)
}

// require skips or fails the test if err says that the kernel is of no use to it.
func require(t testing.TB, err error) {
	t.Helper()
	switch {
	case err == nil:
	case os.Getenv(requireEnv) == "1":
		t.Fatalf("a usable nbd kernel is required here: %v", err)
	default:
		t.Skipf("no usable nbd kernel: %v", err)
	}
}

func kernelUsable() error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("not root")
	}
	c, err := nbdnl.New()
	if err != nil {
		return err
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), settleTime)
	defer cancel()
	return c.Probe(ctx)
}

// wantNoDeviceLeft has the test fail at its end, after all that it cleans up, if devices of this
// process are connected that were not when it began. A device that is left makes trouble for other
// tests. Part of a test does not look, for others may run beside it.
func wantNoDeviceLeft(t testing.TB) {
	if strings.Contains(t.Name(), "/") {
		return
	}
	devices := func() census {
		c := make(census)
		c.devices()
		return c
	}
	before := devices()
	t.Cleanup(func() {
		for _, what := range settled(func() []string { return devices().since(before) }) {
			t.Errorf("left behind: %s", what)
		}
	})
}

// settleTime is how long what a test has let go of may take to disappear.
const settleTime = 10 * time.Second

// settled returns what is left when there is nothing any more, or when it had time to disappear.
func settled(look func() []string) []string {
	for patience := time.Now().Add(settleTime); ; {
		left := look()
		if len(left) == 0 || time.Now().After(patience) {
			return left
		}
		runtime.Gosched()
		<-time.After(10 * time.Millisecond)
	}
}

// Main runs the tests, as the body of TestMain, and returns the exit code. When they pass, it still
// fails if they have left open descriptors, running goroutines, or connected devices of this
// process.
//
//	func TestMain(m *testing.M) { os.Exit(nbdnltest.Main(m)) }
func Main(m *testing.M) int {
	before := takeCensus()
	code := m.Run()
	if code != 0 {
		return code
	}
	left := settled(func() []string { return takeCensus().since(before) })
	for _, l := range left {
		fmt.Fprintf(os.Stderr, "left behind: %s\n", l)
		code = 1
	}
	return code
}

// A census lists what exists, by a key that tells one from the next.
type census map[string]string

func takeCensus() census {
	c := make(census)
	c.descriptors()
	c.goroutines()
	c.devices()
	return c
}

// since returns what was not there before.
func (c census) since(before census) []string {
	var fresh []string
	for key, what := range c {
		if _, ok := before[key]; !ok {
			fresh = append(fresh, what)
		}
	}
	return fresh
}

func (c census) descriptors() {
	paths, _ := filepath.Glob("/proc/self/fd/*") // none where there is no /proc
	for _, p := range paths {
		target, err := os.Readlink(p)
		if err != nil || strings.HasPrefix(target, "anon_inode:[event") {
			continue // closed by now, or the Go runtime's own poller
		}
		c["fd "+p+target] = fmt.Sprintf("descriptor %s of %s", filepath.Base(p), target)
	}
}

var goroutineHeader = regexp.MustCompile(`^goroutine \d+`)

func (c census) goroutines() {
	buf := make([]byte, 4<<20)
	stacks := strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n")
	for _, s := range stacks[1:] { // the first is the one that runs this
		if strings.Contains(s, "os/signal.signal_recv") {
			continue // runs from the first signal.Notify on, such as the fuzzer's
		}
		c[goroutineHeader.FindString(s)] = s
	}
}

func (c census) devices() {
	client, err := nbdnl.New()
	if err != nil {
		return // no driver, no devices
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(context.Background(), settleTime)
	defer cancel()
	devices, _ := client.Devices(ctx) // what it returns with an error will do
	for _, d := range devices {
		// An owner that does not exist any more may have been a child of a test.
		ours := d.OwnerPID == os.Getpid() || d.OwnerPID == 0
		if d.Connected() && ours {
			c[fmt.Sprint("device ", d.Index, d.Identifier, d.OwnerTID)] =
				fmt.Sprintf("device %s, %s, identifier %q", nbdnl.Path(d.Index), d.State, d.Identifier)
		}
	}
}
