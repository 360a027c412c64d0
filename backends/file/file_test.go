//go:build unix

package file_test

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/backendtest"
	"github.com/nbdctl/nbdctl/backends/file"
)

// image makes a file with content and returns its path.
func image(t testing.TB, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func open(t testing.TB, path string, opts file.Options) *file.File {
	t.Helper()
	f, err := file.Open(path, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// bothWays runs a test on files with the page cache and without.
func bothWays(t *testing.T, test func(t *testing.T, direct bool)) {
	t.Run("cached", func(t *testing.T) { test(t, false) })
	t.Run("direct", func(t *testing.T) {
		f, err := file.Open(image(t, make([]byte, 4096)), file.Options{Direct: true})
		if errors.Is(err, errors.ErrUnsupported) {
			t.Skip(err)
		}
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if unit := f.BlockSizes().Minimum; unit > 512 {
			t.Skipf("direct I/O takes multiples of %d bytes, not sectors", unit)
		}
		test(t, true)
	})
}

func TestConformance(t *testing.T) { bothWays(t, testConformance) }

func testConformance(t *testing.T, direct bool) {
	create := func(t testing.TB, size int64) *file.File {
		path := filepath.Join(t.TempDir(), "disk.img")
		return open(t, path, file.Options{Create: true, Size: size, Direct: direct})
	}
	reopen := func(t testing.TB, b backends.Backend) backends.Backend {
		if err := b.(*file.File).Close(); err != nil {
			t.Fatal(err)
		}
		return open(t, b.(*file.File).Name(), file.Options{Direct: direct})
	}
	for name, size := range map[string]int64{"odd": 300_001, "long": 5 << 20, "sparse": 1 << 40} {
		if direct {
			size = size / 512 * 512
		}
		t.Run(name, func(t *testing.T) {
			backendtest.Test(t, func(t testing.TB) backends.Backend {
				return create(t, size)
			}, backendtest.Options{Operations: 200, TrimZeroes: true, Reopen: reopen})
		})
	}
	t.Run("read-only", func(t *testing.T) {
		path := image(t, bytes.Repeat([]byte("read-only"), 50_000))
		backendtest.Test(t, func(t testing.TB) backends.Backend {
			return open(t, path, file.Options{ReadOnly: true, Direct: direct})
		}, backendtest.Options{Operations: 200})
	})
	t.Run("nothing supported", func(t *testing.T) {
		backendtest.Test(t, func(t testing.TB) backends.Backend {
			f := create(t, 1<<20)
			f.WithoutSupport()
			return f
		}, backendtest.Options{Operations: 200, Reopen: reopen})
	})
}

func TestDiscard(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "disk.img")
	t.Chdir(dir)
	f := open(t, "disk.img", file.Options{Create: true, Size: 4096})
	t.Chdir("/") // as a background process does
	if err := f.Discard(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the file is still there: %v", err)
	}

	f = open(t, path, file.Options{Create: true, Size: 4096})
	os.Remove(path)
	os.WriteFile(path, []byte("somebody else's"), 0o600)
	if err := f.Discard(); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(path); string(got) != "somebody else's" {
		t.Errorf("the file that took the name is gone: %q, %v", got, err)
	}
}

func TestTail(t *testing.T) { bothWays(t, testTail) }

func testTail(t *testing.T, direct bool) {
	path := image(t, bytes.Repeat([]byte{7}, 1300))
	f := open(t, path, file.Options{BlockSize: 512, Size: 1300, Direct: direct})
	if f.Size() != 1024 || f.Tail() != 276 {
		t.Errorf("size %d, tail %d", f.Size(), f.Tail())
	}
	if err := f.Zero(0, 1024, 0); err != nil {
		t.Fatal(err)
	}
	f.Close()
	got, _ := os.ReadFile(path)
	if want := append(make([]byte, 1024), bytes.Repeat([]byte{7}, 276)...); !bytes.Equal(got, want) {
		t.Error("the tail was touched, or the rest was not")
	}
	if f := open(t, path, file.Options{}); f.Size() != 1300 || f.Tail() != 0 {
		t.Errorf("without a block size: size %d, tail %d", f.Size(), f.Tail())
	}
}

func TestOutside(t *testing.T) {
	path := image(t, bytes.Repeat([]byte{1}, 1000))
	f := open(t, path, file.Options{})
	for _, r := range [][2]int64{{-1, 1}, {1000, 1}, {999, 2}, {1 << 62, 1}, {0, 1001}, {1<<63 - 1, 10}} {
		off, n := r[0], r[1]
		_, werr := f.WriteAt(make([]byte, n), off)
		_, ferr := f.WriteAtFUA(make([]byte, n), off)
		for call, err := range map[string]error{
			"WriteAt":    werr,
			"WriteAtFUA": ferr,
			"Trim":       f.Trim(off, n),
			"Zero":       f.Zero(off, n, 0),
			"Extents":    f.Extents(off, n, nil),
		} {
			if err == nil {
				t.Errorf("%s %d+%d: no error", call, off, n)
			}
		}
	}
	if st, _ := os.Stat(path); st.Size() != 1000 {
		t.Errorf("the file is %d bytes long now", st.Size())
	}
	for _, tt := range []struct {
		off  int64
		n    int
		want int
		err  error
	}{{990, 10, 10, nil}, {990, 20, 10, io.EOF}, {1000, 1, 0, io.EOF}, {1 << 62, 1, 0, io.EOF}} {
		if n, err := f.ReadAt(make([]byte, tt.n), tt.off); n != tt.want || err != tt.err {
			t.Errorf("ReadAt of %d at %d: %d, %v; want %d, %v", tt.n, tt.off, n, err, tt.want, tt.err)
		}
	}
}

// A file that is cut under the device gives errors, not zeros.
func TestShrunk(t *testing.T) { bothWays(t, testShrunk) }

func testShrunk(t *testing.T, direct bool) {
	path := image(t, bytes.Repeat([]byte{1}, 10_000))
	f := open(t, path, file.Options{Direct: direct})
	if err := os.Truncate(path, 5000); err != nil {
		t.Fatal(err)
	}
	n, err := f.ReadAt(make([]byte, 4096), 4096)
	if n != 5000-4096 || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("%d, %v", n, err)
	}
	if n, err := f.ReadAt(make([]byte, 4096), 0); n != 4096 || err != nil {
		t.Errorf("what is left: %d, %v", n, err)
	}
}

func TestReadOnly(t *testing.T) { bothWays(t, testReadOnly) }

func testReadOnly(t *testing.T, direct bool) {
	path := image(t, bytes.Repeat([]byte("content."), 64))
	d := backends.Probe(open(t, path, file.Options{ReadOnly: true, Direct: direct}))
	if d.Caps&^(backends.CapReadTo|backends.CapCache) != backends.CapExtents {
		t.Errorf("read-only file: %v", d.Caps)
	}
}

func TestNew(t *testing.T) { bothWays(t, testNew) }

func testNew(t *testing.T, direct bool) {
	path := image(t, bytes.Repeat([]byte{1}, 4096))
	for _, tt := range []struct {
		name string
		flag int
		opts file.Options
		want error
		caps backends.Caps
	}{
		{"writable", os.O_RDWR, file.Options{}, nil, backends.CapWrite},
		{"made read-only", os.O_RDWR, file.Options{ReadOnly: true}, nil, 0},
		{"opened read-only", os.O_RDONLY, file.Options{}, nil, 0},
		{"write-only", os.O_WRONLY, file.Options{}, fs.ErrInvalid, 0},
		{"append", os.O_RDWR | os.O_APPEND, file.Options{}, fs.ErrInvalid, 0},
		{"create", os.O_RDWR, file.Options{Create: true, Size: 4096}, fs.ErrInvalid, 0},
		{"size", os.O_RDWR, file.Options{Size: 1}, &file.SizeError{Path: path, Have: 4096, Want: 1}, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			osf, err := os.OpenFile(path, tt.flag, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer osf.Close()
			tt.opts.Direct = direct
			f, err := file.New(osf, tt.opts)
			var size *file.SizeError
			if errors.As(err, &size) {
				size.BlockSize = 0
				if d := cmp.Diff(tt.want, error(size)); d != "" {
					t.Error(d)
				}
			} else if !errors.Is(err, tt.want) {
				t.Fatalf("%v, want %v", err, tt.want)
			}
			if err != nil {
				if _, err := osf.Stat(); err != nil {
					t.Errorf("a file that was refused is closed: %v", err)
				}
				return
			}
			defer f.Close()
			if got := backends.Probe(f).Caps & backends.CapWrite; got != tt.caps {
				t.Errorf("%v, want %v", got, tt.caps)
			}
		})
	}
	closed, _ := os.Open(path)
	closed.Close()
	if _, err := file.New(closed, file.Options{Direct: direct}); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("closed file: %v", err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	if _, err := file.New(r, file.Options{Direct: direct}); !errors.Is(err, file.ErrNotDisk) {
		t.Errorf("pipe: %v", err)
	}
}

func TestClosed(t *testing.T) { bothWays(t, testClosed) }

func testClosed(t *testing.T, direct bool) {
	f := open(t, image(t, make([]byte, 4096)), file.Options{Direct: direct})
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 512)
	_, rerr := f.ReadAt(p, 0)
	_, werr := f.WriteAt(p, 0)
	for call, err := range map[string]error{
		"ReadAt":  rerr,
		"WriteAt": werr,
		"Sync":    f.Sync(),
		"Trim":    f.Trim(0, 512),
		"Zero":    f.Zero(0, 512, 0),
		"Extents": f.Extents(0, 512, nil),
		"Close":   f.Close(),
	} {
		if !errors.Is(err, fs.ErrClosed) {
			t.Errorf("%s after Close: %v", call, err)
		}
	}
}
