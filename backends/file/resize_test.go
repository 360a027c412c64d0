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

func TestResize(t *testing.T) {
	path := image(t, bytes.Repeat([]byte{7}, 1300))
	f := open(t, path, file.Options{BlockSize: 512})
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

// A file that somebody else has made longer keeps what it contains: it is taken as
// it is, or not at all.
func TestResizeByOther(t *testing.T) {
	path := image(t, bytes.Repeat([]byte{7}, 1024))
	f := open(t, path, file.Options{BlockSize: 512})
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
func TestResizeReadOnly(t *testing.T) {
	path := image(t, bytes.Repeat([]byte{7}, 1024))
	f := open(t, path, file.Options{BlockSize: 512, ReadOnly: true})
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
