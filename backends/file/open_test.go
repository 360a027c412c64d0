//go:build unix

package file_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/nbdctl/nbdctl/backends/file"
)

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	readOnly := filepath.Join(dir, "read-only")
	os.WriteFile(readOnly, []byte("content"), 0o400)
	small := image(t, []byte("small"))
	empty := image(t, nil)
	for _, tt := range []struct {
		path string
		opts file.Options
		want error
		says string
	}{
		{filepath.Join(dir, "missing"), file.Options{}, fs.ErrNotExist, "missing"},
		{filepath.Join(dir, "missing"), file.Options{ReadOnly: true}, fs.ErrNotExist, "missing"},
		{filepath.Join(dir, "missing"), file.Options{Size: 4096}, fs.ErrNotExist, "missing"},
		{filepath.Join(dir, "missing"), file.Options{Create: true}, fs.ErrNotExist, "no size to create it with"},
		{filepath.Join(dir, "missing", "disk.img"), file.Options{Create: true, Size: 4096}, fs.ErrNotExist, "missing"},
		{dir, file.Options{}, file.ErrNotDisk, "directory"},
		{dir, file.Options{ReadOnly: true}, file.ErrNotDisk, "directory"},
		{fifo, file.Options{}, file.ErrNotDisk, "named pipe"},
		{fifo, file.Options{ReadOnly: true}, file.ErrNotDisk, "named pipe"},
		{"/dev/null", file.Options{}, file.ErrNotDisk, "character device"},
		{small, file.Options{Size: -1}, fs.ErrInvalid, "size -1"},
		{small, file.Options{BlockSize: -1}, fs.ErrInvalid, "block size -1"},
		{small, file.Options{Create: true, Size: 5, ReadOnly: true}, fs.ErrInvalid, "read-only"},
		{small, file.Options{Size: 4}, nil, "its size is 5 bytes, not 4"},
		{small, file.Options{Size: 6, Create: true}, nil, "its size is 5 bytes, not 6"},
		{small, file.Options{BlockSize: 512}, nil, "its size of 5 bytes is less than a block of 512"},
		{empty, file.Options{}, nil, "it is empty"},
	} {
		f, err := file.Open(tt.path, tt.opts)
		if err == nil {
			f.Close()
			t.Errorf("Open(%q, %+v): no error", tt.path, tt.opts)
			continue
		}
		var size *file.SizeError
		if tt.want != nil && !errors.Is(err, tt.want) || tt.want == nil && !errors.As(err, &size) {
			t.Errorf("Open(%q, %+v): %v, want %v", tt.path, tt.opts, err, tt.want)
		}
		if !strings.Contains(err.Error(), tt.says) || !strings.HasPrefix(err.Error(), "file: ") {
			t.Errorf("Open(%q, %+v) says %q, want %q in it", tt.path, tt.opts, err, tt.says)
		}
	}
	if got, _ := os.ReadFile(small); string(got) != "small" {
		t.Errorf("a refused file holds %q now", got)
	}
	if _, err := os.Stat(filepath.Join(dir, "missing")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a refused Open left a file: %v", err)
	}
	if os.Geteuid() != 0 { // root may open anything
		if _, err := file.Open(readOnly, file.Options{}); !errors.Is(err, fs.ErrPermission) {
			t.Errorf("file without permission: %v", err)
		}
	}
}

func TestCreate(t *testing.T) { bothWays(t, testCreate) }

func testCreate(t *testing.T, direct bool) {
	t.Chdir(t.TempDir())
	f, err := file.Open("disk.img", file.Options{Create: true, Size: 1 << 30, Direct: direct})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if !f.Created() || f.Size() != 1<<30 {
		t.Errorf("created %v, size %d", f.Created(), f.Size())
	}
	st, err := os.Stat("disk.img")
	if err != nil {
		t.Fatal(err)
	}
	if st.Size() != 1<<30 || st.Sys().(*syscall.Stat_t).Blocks*512 > 1<<20 || st.Mode() != 0o600 {
		t.Errorf("size %d, %d sectors, mode %v", st.Size(), st.Sys().(*syscall.Stat_t).Blocks, st.Mode())
	}
	if _, err := f.WriteAt(bytes.Repeat([]byte("kept"), 128), 0); err != nil {
		t.Fatal(err)
	}
	f.Close()

	// The second time it is there, and stays what it is.
	f, err = file.Open("disk.img", file.Options{Create: true, Size: 1 << 30, Direct: direct})
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 512)
	if f.ReadAt(got, 0); f.Created() || string(got[:4]) != "kept" {
		t.Errorf("created %v, content %q", f.Created(), got)
	}
	if err := f.Discard(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat("disk.img"); err != nil {
		t.Errorf("Discard of a file that was there before: %v", err)
	}
}

func TestCreateLeavesNothing(t *testing.T) {
	for _, opts := range []file.Options{
		{Create: true, Size: 100, BlockSize: 512}, // no whole block
		{Create: true, Size: 1<<63 - 1},           // more than most file systems have
	} {
		path := filepath.Join(t.TempDir(), "disk.img")
		f, err := file.Open(path, opts)
		if err == nil && opts.Size > 1<<50 {
			f.Discard()
			continue
		}
		if err == nil {
			t.Fatalf("%+v: no error", opts)
		}
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%+v: the file is still there: %v", opts, err)
		}
	}
}
