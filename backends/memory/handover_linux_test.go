//go:build !(386 || arm || mips || mipsle)

package memory_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/backendtest"
	"github.com/nbdctl/nbdctl/backends/memory"
)

// inherited hands a device over, as to another process.
func inherited(t testing.TB, m *memory.Memory, o memory.Options) *memory.Memory {
	t.Helper()
	files, err := m.Files()
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Leave(); err != nil {
		t.Fatal(err)
	}
	next, err := memory.Inherit(m.Size(), files, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { next.Close() })
	return next
}

// TestInherit holds that a device which was handed over is as any other, with its content.
func TestInherit(t *testing.T) {
	for _, size := range []int64{1, 100_001, 3<<20 + 512, 1 << 40} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			backendtest.Test(t, func(t testing.TB) backends.Backend {
				m, err := memory.New(size, memory.Options{})
				if err != nil {
					t.Fatal(err)
				}
				return inherited(t, m, memory.Options{})
			}, backendtest.Options{
				TrimZeroes: true, Operations: 300,
				Reopen: func(t testing.TB, b backends.Backend) backends.Backend {
					return inherited(t, b.(*memory.Memory), memory.Options{})
				},
			})
		})
	}
}

// TestInheritMemory holds that memory is counted, and given back, by who has the device.
func TestInheritMemory(t *testing.T) {
	const chunk = 64 << 10
	old, err := memory.New(1<<30, memory.Options{})
	if err != nil {
		t.Fatal(err)
	}
	p := bytes.Repeat([]byte{7}, 3*chunk)
	if _, err := old.WriteAt(p, 5*chunk); err != nil {
		t.Fatal(err)
	}
	files, err := old.Files()
	if err != nil {
		t.Fatal(err)
	}
	m := inherited(t, old, memory.Options{Limit: 5 * chunk})
	if _, err := old.ReadAt(p, 0); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("a device that was left can be read: %v", err)
	}
	if _, err := old.Files(); !errors.Is(err, fs.ErrClosed) || !errors.Is(old.Leave(), fs.ErrClosed) {
		t.Errorf("a device that was left has files: %v", err)
	}
	if m.Used() != 3*chunk || blocks(t, files[0]) != 3*chunk {
		t.Errorf("%d bytes are in use, the file has %d", m.Used(), blocks(t, files[0]))
	}
	// One chunk, and the bookkeeping, are what the limit leaves.
	if _, err := m.WriteAt(p[:1], 0); err != nil {
		t.Error(err)
	}
	if _, err := m.WriteAt(p[:1], chunk); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("beyond the limit: %v", err)
	}
	if err := m.Trim(0, 7*chunk); err != nil || m.Used() != chunk || blocks(t, files[0]) != chunk {
		t.Errorf("after a trim %d bytes are in use, the file has %d: %v", m.Used(), blocks(t, files[0]), err)
	}
	if err := m.Resize(2 << 20); err != nil {
		t.Fatal(err)
	}
	again := inherited(t, m, memory.Options{})
	if again.Size() != 2<<20 || again.Used() != chunk {
		t.Errorf("%d bytes, of which %d are in use", again.Size(), again.Used())
	}
	if _, err := again.ReadAt(p[:chunk], 7*chunk); err != nil || p[0] != 7 || p[chunk-1] != 7 {
		t.Errorf("the content is lost: %v", err)
	}
	if err := again.Close(); err != nil || blocks(t, files[0]) != 0 {
		t.Errorf("after Close the file has %d bytes: %v", blocks(t, files[0]), err)
	}
	for _, f := range files {
		f.Close()
	}
}

// blocks returns how many bytes of memory a file takes.
func blocks(t *testing.T, f *os.File) int64 {
	t.Helper()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return st.Sys().(*syscall.Stat_t).Blocks * 512
}

// TestInheritRefused holds that files are refused that are no device, or not this one, and that
// none stays open.
func TestInheritRefused(t *testing.T) {
	good := func() []*os.File {
		m, err := memory.New(1<<20, memory.Options{})
		if err != nil {
			t.Fatal(err)
		}
		files, err := m.Files()
		if err := errors.Join(err, m.Leave()); err != nil {
			t.Fatal(err)
		}
		return files
	}
	unsealed := func() *os.File {
		fd, err := unix.MemfdCreate("x", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
		if err != nil {
			t.Fatal(err)
		}
		f := os.NewFile(uintptr(fd), "x")
		if err := f.Truncate(1 << 20); err != nil {
			t.Fatal(err)
		}
		return f
	}
	regular, err := os.Create(filepath.Join(t.TempDir(), "x"))
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		size  int64
		limit int64
		files []*os.File
	}{
		"none":           {1 << 20, 0, nil},
		"one":            {1 << 20, 0, good()[:1]},
		"too short":      {2 << 20, 0, good()},
		"no size":        {0, 0, good()},
		"no limit":       {1 << 20, -1, good()},
		"no memfd":       {1 << 20, 0, []*os.File{regular, good()[1]}},
		"can be cut":     {1 << 20, 0, []*os.File{unsealed(), good()[1]}},
		"bits can be":    {1 << 20, 0, []*os.File{good()[0], unsealed()}},
		"bits too short": {1 << 50, 0, []*os.File{long(t, 1<<50), good()[1]}},
	} {
		if m, err := memory.Inherit(tt.size, tt.files, memory.Options{Limit: tt.limit}); m != nil || err == nil {
			t.Errorf("%s: it was taken", name)
		}
		for _, f := range tt.files {
			if _, err := f.Stat(); !errors.Is(err, fs.ErrClosed) {
				t.Errorf("%s: a file stays open: %v", name, err)
			}
		}
	}
}

// long returns the content of a device of that size.
func long(t *testing.T, size int64) *os.File {
	t.Helper()
	m, err := memory.New(size, memory.Options{Limit: 1 << 40})
	if err != nil {
		t.Fatal(err)
	}
	files, err := m.Files()
	if err := errors.Join(err, m.Leave()); err != nil {
		t.Fatal(err)
	}
	return files[0]
}
