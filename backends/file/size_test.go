//go:build unix

package file_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/backendtest"
	"github.com/nbdctl/nbdctl/backends/file"
)

// Without a block size a file is a device to the byte, down to a single one and, if that
// is asked for, to none.
func TestToTheByte(t *testing.T) {
	for _, size := range []int64{0, 1, 511, 513, 1000} {
		for _, readOnly := range []bool{false, true} {
			t.Run(fmt.Sprintf("%d bytes, read-only %t", size, readOnly), func(t *testing.T) {
				content := bytes.Repeat([]byte{7}, int(size))
				path := image(t, content)
				f := open(t, path, file.Options{ReadOnly: readOnly, AllowEmpty: true})
				if f.Size() != size || f.Tail() != 0 {
					t.Errorf("size %d, tail %d", f.Size(), f.Tail())
				}
				got := make([]byte, size+1)
				if n, err := f.ReadAt(got, 0); int64(n) != size || err != io.EOF || !bytes.Equal(got[:n], content) {
					t.Errorf("read %d bytes (%v): %x", n, err, got[:n])
				}
				var extents []backends.Extent
				err := f.Extents(0, size, func(e backends.Extent) bool { extents = append(extents, e); return true })
				if err != nil || extentsLength(extents) != size {
					t.Errorf("extents %v (%v)", extents, err)
				}
				if readOnly {
					return
				}
				if _, err := f.WriteAt([]byte{8}, size); !errors.Is(err, syscall.ENOSPC) {
					t.Errorf("write behind the end: %v", err)
				}
				if size > 0 {
					content[size-1] = 8
					if _, err := f.WriteAt([]byte{8}, size-1); err != nil {
						t.Errorf("write of the last byte: %v", err)
					}
				}
				if err := f.Sync(); err != nil {
					t.Errorf("sync: %v", err)
				}
				if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, content) {
					t.Errorf("the file contains %x (%v), want %x", got, err, content)
				}
			})
		}
	}
}

func extentsLength(extents []backends.Extent) (n int64) {
	for _, e := range extents {
		n += e.Length
	}
	return n
}

// What is shorter than a block is no device, unless one of size 0 is of use.
func TestAllowEmpty(t *testing.T) {
	for _, tt := range []struct{ length, tail int64 }{{0, 0}, {1, 1}, {511, 511}} {
		path := image(t, make([]byte, tt.length))
		_, err := file.Open(path, file.Options{BlockSize: 512})
		var size *file.SizeError
		if !errors.As(err, &size) {
			t.Errorf("%d bytes: %v, want a SizeError", tt.length, err)
		} else if d := cmp.Diff(&file.SizeError{Path: path, Have: tt.length, BlockSize: 512}, size); d != "" {
			t.Errorf("%d bytes: error (-want +got):\n%s", tt.length, d)
		}
		f := open(t, path, file.Options{BlockSize: 512, AllowEmpty: true})
		if f.Size() != 0 || f.Tail() != tt.tail {
			t.Errorf("%d bytes: size %d, tail %d", tt.length, f.Size(), f.Tail())
		}
		f.Close()
		if _, err := file.Open(path, file.Options{Size: 512, AllowEmpty: true}); !errors.As(err, &size) {
			t.Errorf("%d bytes instead of 512: %v, want a SizeError", tt.length, err)
		}
	}
}

// Every length keeps the contract.
func TestConformanceShort(t *testing.T) {
	for _, size := range []int{1, 511, 513, 1000} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			backendtest.Test(t, func(t testing.TB) backends.Backend {
				return open(t, image(t, make([]byte, size)), file.Options{})
			}, backendtest.Options{Operations: 100, TrimZeroes: true})
		})
	}
}

// A read that finds the file to be shorter than the device tells where it read, and how
// long the file is now, wherever in the range it ends.
func TestEndsEarly(t *testing.T) {
	path := image(t, make([]byte, 16<<20))
	f := open(t, path, file.Options{})
	if err := os.Truncate(path, 1<<20); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ off, n, read int64 }{{8 << 20, 4096, 0}, {1<<20 - 100, 4096, 100}, {1 << 20, 1, 0}} {
		n, err := f.ReadAt(make([]byte, tt.n), tt.off)
		want := fmt.Sprintf("file: %s: read of %d bytes at %d: it has only 1048576 bytes now: unexpected EOF",
			path, tt.n, tt.off)
		if int64(n) != tt.read || !errors.Is(err, io.ErrUnexpectedEOF) || err.Error() != want {
			t.Errorf("read %d bytes, %v; want %d, %s", n, err, tt.read, want)
		}
	}
	if _, err := f.ReadAt(make([]byte, 4096), 1<<20-4096); err != nil {
		t.Errorf("read of what is there: %v", err)
	}
}

// Sizes near 2^63 are in messages what they are.
func TestLargeSizes(t *testing.T) {
	const most = 1<<63 - 1
	for _, tt := range []struct {
		err  error
		says []string
	}{
		{&file.TailError{Path: "x", Have: most, BlockSize: 512}, []string{
			"last 511 of its 9223372036854775807 bytes",
			"truncate -s 9223372036854775296)",
		}},
		{&file.TailError{Path: "x", Have: most - 512, BlockSize: 512}, []string{
			"last 511 of",
			"truncate -s 9223372036854774784)",
			"truncate -s 9223372036854775296)",
		}},
		{&file.SizeError{Path: "x", Have: most, Want: most - 1}, []string{
			"9223372036854775807 bytes, not 9223372036854775806",
		}},
	} {
		got := tt.err.Error()
		for _, says := range tt.says {
			if !strings.Contains(got, says) || strings.Contains(got, "-9") {
				t.Errorf("%q, want %q in it", got, says)
			}
		}
	}

	f := open(t, image(t, make([]byte, 1000)), file.Options{})
	for _, r := range []struct{ off, n int64 }{{most, 1}, {most - 4096, 4096}, {1, most}, {most, most}, {-1, most}} {
		if err := f.Trim(r.off, r.n); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("trim of %d bytes at %d: %v", r.n, r.off, err)
		}
		if err := f.Zero(r.off, r.n, 0); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("zeros for %d bytes at %d: %v", r.n, r.off, err)
		}
		if err := f.Extents(r.off, r.n, func(backends.Extent) bool { return true }); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("extents of %d bytes at %d: %v", r.n, r.off, err)
		}
	}
	if n, err := f.ReadAt(make([]byte, 1), most); n != 0 || err != io.EOF {
		t.Errorf("read at %d: %d bytes, %v", int64(most), n, err)
	}
	if _, err := f.WriteAt(make([]byte, 1), most); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("write at %d: %v", int64(most), err)
	}
	if _, err := f.WriteAtFUA(make([]byte, 1), most); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("durable write at %d: %v", int64(most), err)
	}
	if _, err := file.Open(f.Name(), file.Options{ReadOnly: true, BlockSize: 1 << 30}); !errors.Is(err, fs.ErrInvalid) {
		t.Errorf("blocks of 1 GiB: %v", err)
	}
}
