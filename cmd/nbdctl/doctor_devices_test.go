package main

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
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
