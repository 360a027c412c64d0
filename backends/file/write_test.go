package file_test

import (
	"bytes"
	"path/filepath"
	"testing"

	"github.com/nbdctl/nbdctl/backends/file"
)

// TestWriteInPieces writes what is longer than a single write: every byte goes to its place, and
// none beside it.
func TestWriteInPieces(t *testing.T) {
	const size = 1 << 20
	f, err := file.Open(filepath.Join(t.TempDir(), "disk"), file.Options{Create: true, Size: size})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	data := make([]byte, size)
	for i := range data {
		data[i] = byte(i*7>>3) | 1
	}
	for _, n := range []int{0, 1, 128<<10 - 1, 128 << 10, 128<<10 + 1, 256 << 10, 500_000, size - 2} {
		if _, err := f.WriteAt(make([]byte, size), 0); err != nil {
			t.Fatal(err)
		}
		if m, err := f.WriteAt(data[:n], 1); m != n || err != nil {
			t.Fatalf("%d bytes of %d written, %v", m, n, err)
		}
		got := make([]byte, size)
		if _, err := f.ReadAt(got, 0); err != nil {
			t.Fatal(err)
		}
		want := append(append([]byte{0}, data[:n]...), make([]byte, size-n-1)...)
		if !bytes.Equal(got, want) {
			t.Errorf("%d bytes: what is stored is not what was written", n)
		}
	}
}
