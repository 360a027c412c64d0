//go:build unix

package file_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/file"
)

func TestResize(t *testing.T) { bothWays(t, testResize) }

func testResize(t *testing.T, direct bool) {
	path := image(t, bytes.Repeat([]byte{7}, 1024))
	f := open(t, path, file.Options{BlockSize: 512, Direct: direct})
	for _, tt := range []struct{ size, content int64 }{{2048, 1024}, {512, 512}, {512, 512}, {1 << 20, 512}} {
		if err := f.Resize(tt.size); err != nil || f.Size() != tt.size || f.Tail() != 0 {
			t.Fatalf("resize to %d: size %d, tail %d, %v", tt.size, f.Size(), f.Tail(), err)
		}
		got, err := os.ReadFile(path)
		want := append(bytes.Repeat([]byte{7}, int(tt.content)), make([]byte, tt.size-tt.content)...)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("resize to %d: the file has other content (%v)", tt.size, err)
		}
		if _, err := f.WriteAt([]byte{7}, tt.size); err == nil {
			t.Errorf("%d bytes: a write behind the end was taken", tt.size)
		}
	}
	for _, size := range []int64{0, -512, 513} {
		if err := f.Resize(size); !errors.Is(err, fs.ErrInvalid) || f.Size() != 1<<20 {
			t.Errorf("resize to %d: %v", size, err)
		}
	}
}

// The bytes behind the last whole block are not the device's: they are lost only with
// what is cut off, and once somebody has taken them away the file grows.
func TestResizeTail(t *testing.T) { bothWays(t, testResizeTail) }

func testResizeTail(t *testing.T, direct bool) {
	content := bytes.Repeat([]byte{7}, 1300)
	whole := append(bytes.Clone(content), make([]byte, 1536-1300)...)
	regrown := append(bytes.Clone(content[:1024]), make([]byte, 1024)...)
	for _, tt := range []struct {
		name       string
		truncate   int64 // by somebody else; 0: not at all
		size       int64
		refused    bool
		have, tail int64  // of the device
		content    []byte // of the file
	}{
		{"growing", 0, 2048, true, 1024, 276, content},
		{"growing by the rest of the block", 0, 1536, true, 1024, 276, content},
		{"as it is", 0, 1024, false, 1024, 276, content},
		{"shrinking", 0, 512, false, 512, 0, content[:512]},
		{"growing after it was cut off", 1024, 2048, false, 2048, 0, regrown},
		{"after it was cut off", 1024, 1024, false, 1024, 0, content[:1024]},
		{"after its block was made whole", 1536, 1536, false, 1536, 0, whole},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := image(t, content)
			f := open(t, path, file.Options{BlockSize: 512, Direct: direct})
			if tt.truncate > 0 {
				if err := os.Truncate(path, tt.truncate); err != nil {
					t.Fatal(err)
				}
			}
			err := f.Resize(tt.size)
			var tail *file.TailError
			want := &file.TailError{Path: path, Have: 1300, BlockSize: 512}
			if tt.refused != errors.As(err, &tail) || !tt.refused && err != nil {
				t.Errorf("error %v, want a TailError: %t", err, tt.refused)
			} else if d := cmp.Diff(want, tail); tt.refused && d != "" {
				t.Errorf("error (-want +got):\n%s", d)
			}
			if f.Size() != tt.have || f.Tail() != tt.tail {
				t.Errorf("size %d, tail %d, want %d, %d", f.Size(), f.Tail(), tt.have, tt.tail)
			}
			if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, tt.content) {
				t.Errorf("the file has other content, %d bytes (%v)", len(got), err)
			}
		})
	}
}

// A file that somebody else has made longer keeps what it contains: it is taken as
// it is, or not at all.
func TestResizeByOther(t *testing.T) { bothWays(t, testResizeByOther) }

func testResizeByOther(t *testing.T, direct bool) {
	path := image(t, bytes.Repeat([]byte{7}, 1024))
	f := open(t, path, file.Options{BlockSize: 512, Direct: direct})
	if err := os.WriteFile(path, bytes.Repeat([]byte{8}, 2048), 0); err != nil {
		t.Fatal(err)
	}
	if f.Size() != 1024 {
		t.Errorf("size %d, want what the device has", f.Size())
	}
	var size *file.SizeError
	if err := f.Resize(4096); !errors.As(err, &size) {
		t.Errorf("to another size: %v, want a SizeError", err)
	} else if d := cmp.Diff(&file.SizeError{Path: path, Have: 2048, Want: 1024, BlockSize: 512}, size); d != "" {
		t.Errorf("error (-want +got):\n%s", d)
	}
	if err := f.Resize(2048); err != nil || f.Size() != 2048 {
		t.Errorf("to that size: size %d, %v", f.Size(), err)
	}
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, bytes.Repeat([]byte{8}, 2048)) {
		t.Errorf("the file has other content (%v)", err)
	}
}

// A read-only file cannot be resized, but tells when it has grown.
func TestResizeReadOnly(t *testing.T) { bothWays(t, testResizeReadOnly) }

func testResizeReadOnly(t *testing.T, direct bool) {
	path := image(t, bytes.Repeat([]byte{7}, 1024))
	f := open(t, path, file.Options{BlockSize: 512, ReadOnly: true, Direct: direct})
	if backends.Probe(f).Resizer != nil {
		t.Error("it offers to resize")
	}
	if err := f.Resize(2048); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("resize: %v", err)
	}
	for _, tt := range []struct{ length, size int64 }{{2050, 2048}, {1000, 2048}, {4096, 4096}} {
		if err := os.Truncate(path, tt.length); err != nil {
			t.Fatal(err)
		}
		if f.Size() != tt.size {
			t.Errorf("%d bytes long: size %d, want %d", tt.length, f.Size(), tt.size)
		}
	}
}
