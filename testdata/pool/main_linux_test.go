package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/claim"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// TestMain is the program itself when the test starts it.
func TestMain(m *testing.M) {
	if os.Getenv("POOL_PROGRAM") != "" {
		main()
		return
	}
	os.Exit(nbdnltest.Main(m))
}

// program returns the program for an image with that command, which is a line of shell in which $0
// is the device.
func program(t *testing.T, image, line string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, image, "sh", "-c", line)
	cmd.Env = append(os.Environ(), "POOL_PROGRAM=1")
	cmd.Stderr = os.Stderr
	return cmd
}

// ours returns the devices that the program has, or may have where the kernel does not show whose
// they are.
func ours(t *testing.T, c *nbdnl.Client) []nbdnl.Status {
	t.Helper()
	devices, err := c.Connected()
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(devices, func(s nbdnl.Status) bool {
		return s.HasIdentifier && !strings.HasPrefix(s.Identifier, "pool-example:")
	})
}

// TestKernelPoolProgram has the program killed while a command writes to its device, and runs it
// again: the command has waited, and what it wrote is there.
func TestKernelPoolProgram(t *testing.T) {
	nbdnltest.RequireKernel(t)
	c, err := nbdnl.New()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	dir, err := os.MkdirTemp("/dev/shm", "pool")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	image, done := filepath.Join(dir, "image"), filepath.Join(dir, "done")
	again := nbdnltest.Identifiers.In(t)
	line := `printf 'written before' >"$0"; sync "$0"; kill -9 $PPID`
	if again {
		line += "\nprintf 'written after it' | dd of=\"$0\" oflag=direct,sync bs=4096 seek=1 conv=sync,fsync " +
			"status=none && touch " + done
	}
	killed := program(t, image, line)
	if err := killed.Run(); err == nil {
		t.Fatal("the program was not killed")
	}
	left := ours(t, c)
	if len(left) != 1 {
		t.Fatalf("the killed program has left %v, want a device", left)
	}
	if !again { // Before Linux 5.14 the program leaves it alone, for it can't know that it is its own.
		if err := c.Detach(t.Context(), left[0].Index, nbdnl.DetachOptions{Any: true, Dead: true}); err != nil {
			t.Fatal(err)
		}
	}

	line = "printf 'written by a command' | dd of=\"$0\" bs=512 seek=16 conv=fsync status=none"
	if again {
		line += "; until test -e " + done + "; do sleep 0.1; done; test $0 = " + nbdnl.Path(left[0].Index)
	}
	snapshot, err := program(t, image, line).Output()
	if err != nil {
		t.Fatal(err)
	}
	want := map[int]string{0: "written before", 8192: "written by a command"}
	if again {
		want[4096] = "written after it"
	}
	for at, text := range want {
		if len(snapshot) != size || !bytes.HasPrefix(snapshot[at:], []byte(text)) {
			t.Errorf("the snapshot has %d bytes, and at %d %q", len(snapshot), at, snapshot[at:][:20])
		}
	}
	if left := ours(t, c); len(left) > 0 {
		t.Errorf("%v are left, of one of the two", left)
	}
	if leases, err := claim.Dir("").Leased(); err != nil || len(leases) > 0 {
		t.Errorf("leases of %v are left, error %v", leases, err)
	}
}
