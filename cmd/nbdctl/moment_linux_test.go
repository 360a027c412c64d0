package main

import (
	"os"
	"strings"
	"testing"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
)

// TestKernelEnding asks about a device that was disconnected while somebody holds it, and then
// about what is left: each command says so in a sentence, with the code of what is not connected.
func TestKernelEnding(t *testing.T) {
	requireKernel(t, `I/O error|NBD_DISCONNECT`)
	dev := connected(t, "memory", "--size", "1M", "--name", "ending")
	holder, err := os.Open(dev)
	if err != nil {
		t.Fatal(err)
	}
	defer holder.Close()
	must(t, "disconnect", "--force", dev)
	check := func(sentence string) {
		t.Helper()
		for _, args := range [][]string{
			{"stats", dev},
			{"stats", dev, "--watch"},
			{"resize", dev, "2M"},
			{"reconfigure", dev, "--timeout", "40s"},
		} {
			r := nbdctl(t, args...)
			oneLine := strings.Count(r.stderr, "\n") == 1
			if !r.ended(exit.NotFound, sentence) || strings.Contains(r.stderr, "dial") || !oneLine {
				t.Errorf("%v: exit code %d, %q; want %q", args, r.code, r.stderr, sentence)
			}
		}
	}
	check("is being disconnected by pid")
	s := must(t, "status", dev)
	if !containsAll(s, "disconnecting", "is being disconnected") || strings.Contains(s, "dial") {
		t.Errorf("status shows:\n%s", s)
	}
	holder.Close()
	eventually(t, func() bool { return listed(t, dev) == nil }, "the end of %s", dev)
	check("is not connected")
	if r := nbdctl(t, "status", dev); r.code != int(exit.NotFound) {
		t.Errorf("status of what has gone: exit code %d", r.code)
	}
}
