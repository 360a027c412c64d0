package host

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// inotifyEvent is an event as the kernel writes it.
func inotifyEvent(mask uint32, name string) []byte {
	b := binary.NativeEndian.AppendUint32(nil, 1)
	b = binary.NativeEndian.AppendUint32(b, mask)
	b = binary.NativeEndian.AppendUint32(b, 0)
	padded := make([]byte, (len(name)+16)/16*16)
	if name == "" {
		padded = nil
	}
	copy(padded, name)
	return append(binary.NativeEndian.AppendUint32(b, uint32(len(padded))), padded...)
}

// TestAppears finds what has appeared behind other events, and trusts no overflow.
func TestAppears(t *testing.T) {
	gone := inotifyEvent(unix.IN_DELETE, "a name of more than 16 bytes")
	for _, tt := range []struct {
		events []byte
		want   bool
	}{
		{nil, false},
		{gone, false},
		{inotifyEvent(unix.IN_CREATE|unix.IN_ISDIR, "new"), true},
		{append(gone, inotifyEvent(unix.IN_MOVED_TO, "state.json")...), true},
		{append(gone, inotifyEvent(unix.IN_IGNORED, "")...), false},
		{append(gone, inotifyEvent(unix.IN_Q_OVERFLOW, "")...), true},
		{gone[:len(gone)-1], false},
	} {
		if got := appears(tt.events); got != tt.want {
			t.Errorf("%x: %t", tt.events, got)
		}
	}
}

// TestWatcher is told of what appears and goes, not of what is written, and waits no more once it
// is closed.
func TestWatcher(t *testing.T) {
	w, err := newWatcher()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	file := filepath.Join(dir, "log")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := w.add(dir); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.add(filepath.Join(dir, "absent")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a directory that is not there: %v", err)
	}
	if err := os.WriteFile(file, []byte("a line"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if appeared, err := w.next(); appeared || err != nil {
		t.Errorf("appeared %t, error %v, when a file was written to and removed", appeared, err)
	}
	waiting := make(chan error)
	go func() {
		_, err := w.next()
		waiting <- err
	}()
	if err := w.close(); err != nil {
		t.Error(err)
	}
	if err := <-waiting; !errors.Is(err, os.ErrClosed) {
		t.Errorf("waiting ends with %v", err)
	}
}
