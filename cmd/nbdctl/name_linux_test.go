package main

import (
	"testing"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
)

// TestKernelNamedHelp holds that a device named "help" is one for every command.
func TestKernelNamedHelp(t *testing.T) {
	requireKernel(t)
	for _, name := range []string{"help", "h"} {
		dev := connected(t, "memory", "--size", "1M", "--name", name)
		if got := statusOf(t, name)["path"]; got != dev {
			t.Errorf("status %s shows %v, want %s", name, got, dev)
		}
		must(t, "resize", name, "2M")
		if size := sysfs(t, dev, "size"); size != "4096" {
			t.Errorf("resize %s left the size at %s sectors, want 4096", name, size)
		}
		must(t, "reconfigure", name, "--timeout", "5s")
		must(t, "stats", name)
		must(t, "disconnect", name)
		if r := nbdctl(t, "disconnect", name); r.code != int(exit.NotFound) {
			t.Errorf("disconnect %s once more: exit code %d, %s", name, r.code, r.stderr)
		}
	}
}
