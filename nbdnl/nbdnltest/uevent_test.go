package nbdnltest

import (
	"bytes"
	"errors"
	"os"
	"syscall"
	"testing"
)

// TestUeventsOverrun holds that a reader who is too slow is told that it has missed some, once, and
// hears what comes then.
func TestUeventsOverrun(t *testing.T) {
	k := New(t, Options{Devices: 1})
	r, err := k.openUevents()
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 4096)
	for range maxQueued + 1 {
		k.Announce("change", 0)
	}
	if _, err := r.Read(buf); !errors.Is(err, syscall.ENOBUFS) {
		t.Errorf("read after too many events: %v", err)
	}
	k.Announce("add", 0)
	n, err := r.Read(buf)
	if err != nil || !bytes.Contains(buf[:n], []byte("\x00ACTION=add\x00")) {
		t.Errorf("read %q, %v", buf[:n], err)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	if _, err := r.Read(buf); !errors.Is(err, os.ErrClosed) {
		t.Errorf("read after close: %v", err)
	}
}
