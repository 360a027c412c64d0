//go:build unix

package file_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
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
