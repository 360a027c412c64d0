package main

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/doctor"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/inventory"
	"github.com/nbdctl/nbdctl/nbdnl"
)

// TestNoDevices shows that only a /sys that can be seen, and has no device of
// the driver, tells that there is none.
func TestNoDevices(t *testing.T) {
	root := t.TempDir()
	if err := noDevices(root); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without /sys: %v", err)
	}
	show := func(device string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Join(root, "sys/block", device), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	show("loop0")
	if err := noDevices(root); err != nil {
		t.Errorf("with other devices: %v", err)
	}
	show("nbd7")
	if err := noDevices(root); err == nil {
		t.Error("with nbd7 it says that there is none")
	}
}

// TestOrphanStopped holds what is said of a device by ioctls whose process is stopped: only a kick
// frees it.
func TestOrphanStopped(t *testing.T) {
	d := inventory.Device{
		Status:  nbdnl.Status{Index: 3, State: nbdnl.StateLive, Mode: nbdnl.ModeIoctl},
		Entry:   &host.Entry{Record: &host.Record{PID: 4711, Mode: "ioctl"}, Alive: true},
		Stopped: true,
	}
	f := orphan(t.Context(), nil, d)
	const seen = "nbd3 is orphaned: pid 4711, which serves it, is stopped"
	if f.Result != doctor.Problem || f.Seen != seen || f.Remedy != "nbdctl kick nbd3" || f.Fix != nil {
		t.Errorf("doctor finds %v", f)
	}
	const advice = "pid 4711, which serves it, is stopped, and the kernel has ended the device with that: " +
		"all I/O on it fails; nbdctl kick nbd3 frees it"
	if got := orphanAdvice(d.View()); got != advice {
		t.Errorf("list says %q", got)
	}
}
