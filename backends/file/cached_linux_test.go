package file_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/file"
)

// A sink is a reply that says how it was given.
type sink struct {
	room   []byte
	files  bool // File is possible
	how    string
	length int
}

func (s *sink) Bytes(p []byte) { s.how, s.length = "bytes", len(p) }
func (s *sink) Zeros(n int)    { s.how, s.length = "zeros", n }

func (s *sink) Buffer(n int) []byte {
	if n > len(s.room) {
		return nil
	}
	s.how, s.length = "buffer", n
	return s.room[:n]
}

func (s *sink) File(f *os.File, off int64, n int) bool {
	if s.files {
		s.how, s.length = "file", n
	}
	return s.files
}

// TestReadAtTo holds what is answered at once, and in which way.
func TestReadAtTo(t *testing.T) {
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := file.Open(path, file.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if f.Caps()&backends.CapReadTo == 0 {
		t.Skip("this file system cannot read from the page cache only")
	}
	// What was written a moment ago is in the page cache.
	tests := []struct {
		name  string
		off   int64
		n     int
		files bool
		how   string // empty: it would block
	}{
		{"small", 1, 4096, true, "buffer"},
		{"just below the bound", 0, 64 << 10, true, "buffer"},
		{"large", 4095, 64<<10 + 1, true, "file"},
		{"all", 0, 1 << 20, true, "file"},
		{"large, without sendfile", 0, 128 << 10, false, "buffer"},
		{"all, without sendfile", 0, 1 << 20, false, ""},
		{"the last byte", 1<<20 - 1, 1, true, "buffer"},
	}
	for _, tt := range tests {
		s := &sink{room: make([]byte, 256<<10), files: tt.files}
		err := f.ReadAtTo(s, tt.off, tt.n)
		switch {
		case tt.how == "":
			if err != backends.ErrWouldBlock {
				t.Errorf("%s: error %v", tt.name, err)
			}
		case err != nil || s.how != tt.how || s.length != tt.n:
			t.Errorf("%s: error %v, %d bytes by %s, want %d by %s", tt.name, err, s.length, s.how, tt.n, tt.how)
		case s.how == "buffer" && !bytes.Equal(s.room[:tt.n], data[tt.off:][:tt.n]):
			t.Errorf("%s: wrong bytes", tt.name)
		}
	}
	if err := f.ReadAtTo(new(sink), 1<<20, 1); err == nil || err == backends.ErrWouldBlock {
		t.Errorf("past the end: %v", err)
	}
}

// BenchmarkReadAtTo also shows that a read allocates nothing.
func BenchmarkReadAtTo(b *testing.B) {
	path := filepath.Join(b.TempDir(), "disk")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		b.Fatal(err)
	}
	f, err := file.Open(path, file.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	s := &sink{room: make([]byte, 4096), files: true}
	for _, n := range []int{4096, 128 << 10} {
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := f.ReadAtTo(s, 0, n); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// TestReadAtToUncached drops the page cache: then nothing is answered at once, until Cache has
// fetched it.
func TestReadAtToUncached(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	h, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	if err := h.Sync(); err != nil {
		t.Fatal(err)
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(h.Fd()), &st); err != nil || st.Type == unix.TMPFS_MAGIC {
		t.Skip("a file system in memory has nothing else to read from")
	}
	f, err := file.Open(path, file.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if f.Caps()&backends.CapReadTo == 0 {
		t.Skip("this file system cannot read from the page cache only")
	}
	for _, n := range []int{4096, 128 << 10} {
		// The kernel begins to read what is not there also for who does not wait, and a quick disk
		// may have it by then.
		err := error(nil)
		for patience := time.Now().Add(10 * time.Second); err == nil && time.Now().Before(patience); {
			if err := unix.Fadvise(int(h.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
				t.Fatal(err)
			}
			err = f.ReadAtTo(&sink{room: make([]byte, 256<<10), files: true}, 512<<10, n)
		}
		if err != backends.ErrWouldBlock {
			t.Errorf("%d bytes that are not cached: %v", n, err)
		}
	}
	if err := f.Cache(512<<10, 128<<10); err != nil {
		t.Fatal(err)
	}
	for patience := time.Now().Add(10 * time.Second); ; <-time.After(5 * time.Millisecond) {
		s := &sink{room: make([]byte, 256<<10), files: true}
		err := f.ReadAtTo(s, 512<<10, 128<<10)
		if err == nil {
			break
		}
		if err != backends.ErrWouldBlock || time.Now().After(patience) {
			t.Fatalf("what was to be read ahead: %v", err)
		}
	}
}
