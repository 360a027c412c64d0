package file_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/file"
)

// direct makes a file of that size that is read and written past the page cache, on a
// file system where that can be done.
func direct(t testing.TB, size int64) *file.File {
	t.Helper()
	f, err := file.Open(filepath.Join(t.TempDir(), "disk.img"), file.Options{Create: true, Size: size, Direct: true})
	if errors.Is(err, errors.ErrUnsupported) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// cachedBytes returns how much of a file is in the page cache.
func cachedBytes(t testing.TB, path string) int {
	t.Helper()
	out, err := exec.Command("fincore", "--noheadings", "--bytes", "--output", "RES", path).Output()
	if err != nil {
		t.Fatalf("fincore: %v", err)
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(out)))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// at returns n bytes whose address is a multiple of 4096, plus skip.
func at(skip, n int) []byte {
	return file.AlignedMemory(skip+n, 4096)[skip:]
}

// TestDirectLeavesNoCache also shows that the same requests otherwise do leave one.
func TestDirectLeavesNoCache(t *testing.T) {
	bothWays(t, func(t *testing.T, direct bool) {
		const size = 1 << 20
		path := filepath.Join(t.TempDir(), "disk.img")
		f := open(t, path, file.Options{Create: true, Size: size, Direct: direct})
		for _, skip := range []int{0, 16} {
			p := at(skip, size/4)
			for i := range p {
				p[i] = byte(i * 7 >> 3)
			}
			if _, err := f.WriteAt(p, 0); err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteAtFUA(p, size/4); err != nil {
				t.Fatal(err)
			}
			if err := f.Zero(size/2, size/4, backends.ZeroNoHole); err != nil {
				t.Fatal(err)
			}
			if err := f.Sync(); err != nil {
				t.Fatal(err)
			}
			for off := int64(0); off < size; off += int64(len(p)) {
				got := at(skip, len(p))
				if _, err := f.ReadAt(got, off); err != nil {
					t.Fatal(err)
				}
				want := p
				if off >= size/2 {
					want = make([]byte, len(p))
				}
				if !bytes.Equal(got, want) {
					t.Errorf("wrong bytes at %d", off)
				}
			}
		}
		if n := cachedBytes(t, path); direct && n != 0 || !direct && n == 0 {
			t.Errorf("%d bytes in the page cache", n)
		}
	})
}

// TestDirectMemory reads and writes at addresses that no device can use.
func TestDirectMemory(t *testing.T) {
	const size = 1 << 20
	f := direct(t, size)
	unit := f.BlockSizes().Minimum
	fill := byte(0)
	for _, skip := range []int{0, 1, 4, 16, 28, 511, 512, 2048} {
		for _, n := range []int{unit, 8 * unit, 128 << 10, 128<<10 + unit, 300 * unit, 512 << 10} {
			for _, write := range []func([]byte, int64) (int, error){f.WriteAt, f.WriteAtFUA} {
				fill++
				if _, err := f.WriteAt(make([]byte, size), 0); err != nil {
					t.Fatal(err)
				}
				p := at(skip, n)
				for i := range p {
					p[i] = byte(i*7>>3) ^ fill | 1
				}
				want := append(append(make([]byte, unit), p...), make([]byte, size-unit-n)...)
				if m, err := write(p, int64(unit)); m != n || err != nil {
					t.Fatalf("write of %d bytes from %d: %d, %v", n, skip, m, err)
				}
				got := at(skip, size)
				if m, err := f.ReadAt(got, 0); m != size || err != nil {
					t.Fatalf("read: %d, %v", m, err)
				}
				if !bytes.Equal(got, want) {
					t.Fatalf("write of %d bytes from %d: other bytes are stored", n, skip)
				}
			}
		}
	}
}

// TestDirectParts asks for parts of sectors.
func TestDirectParts(t *testing.T) {
	f := direct(t, 1<<20)
	unit := f.BlockSizes().Minimum
	if f.BlockSizes().Preferred < unit || unit < 512 {
		t.Errorf("block sizes %+v", f.BlockSizes())
	}
	for _, r := range [][2]int{{1, unit}, {0, unit - 1}, {unit / 2, unit / 2}, {unit, 1}} {
		p := at(0, r[1])
		_, read := f.ReadAt(p, int64(r[0]))
		_, write := f.WriteAt(p, int64(r[0]))
		_, fua := f.WriteAtFUA(p, int64(r[0]))
		for call, err := range map[string]error{"read": read, "write": write, "FUA write": fua} {
			if !errors.Is(err, syscall.EINVAL) || !strings.Contains(err.Error(), "multiples of "+strconv.Itoa(unit)) {
				t.Errorf("%s of %d bytes at %d: %v", call, r[1], r[0], err)
			}
		}
	}
	if err := f.Sync(); err != nil {
		t.Errorf("what was refused counts as lost: %v", err)
	}
}

// TestDirectAndCached has others read and write the file through the page cache, as qemu-img or cp
// do.
func TestDirectAndCached(t *testing.T) {
	f := direct(t, 1<<20)
	other, err := os.OpenFile(f.Name(), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	p, got := at(0, 4096), at(0, 4096)
	for i := range byte(50) {
		writer, reader := f.WriteAt, other.ReadAt
		if i%2 == 1 {
			writer, reader = other.WriteAt, f.ReadAt
		}
		copy(p, bytes.Repeat([]byte{i + 1}, len(p)))
		if _, err := writer(p, 8192); err != nil {
			t.Fatal(err)
		}
		if _, err := reader(got, 8192); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, p) {
			t.Fatalf("round %d: read %d, written %d", i, got[0], p[0])
		}
	}
}

// TestDirectImpossible opens a file that there is nothing of but the page cache.
func TestDirectImpossible(t *testing.T) {
	dir, err := os.MkdirTemp("/dev/shm", "nbdctl-")
	if err != nil {
		t.Skip(err)
	}
	defer os.RemoveAll(dir)
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil || st.Type != unix.TMPFS_MAGIC {
		t.Skipf("/dev/shm is not in memory: %v", err)
	}
	path := filepath.Join(dir, "disk.img")
	for _, create := range []bool{true, false} {
		f, err := file.Open(path, file.Options{Create: create, Size: 4096, Direct: true})
		if err == nil {
			f.Close()
			t.Fatal("no error")
		}
		var no *file.DirectError
		if !errors.As(err, &no) || !errors.Is(err, errors.ErrUnsupported) {
			t.Fatalf("%v, want a DirectError", err)
		}
		if d := cmp.Diff(&file.DirectError{Path: path, Reason: no.Reason}, no); d != "" || no.Reason == "" {
			t.Error(d)
		}
		if create {
			if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("it left a file: %v", err)
			}
			if err := os.WriteFile(path, make([]byte, 4096), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestDirectNew tells by an open file's flags what New has made of it.
func TestDirectNew(t *testing.T) {
	direct(t, 4096) // or skip
	for _, tt := range []struct {
		name       string
		flag       int
		opts       file.Options
		fails      bool
		wantDirect bool
	}{
		{"asked for", 0, file.Options{Direct: true}, false, true},
		{"opened so", unix.O_DIRECT, file.Options{}, false, true},
		{"not", 0, file.Options{}, false, false},
		{"refused", 0, file.Options{Direct: true, Size: 1}, true, false},
	} {
		osf, err := os.OpenFile(image(t, make([]byte, 8192)), os.O_RDWR|tt.flag, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer osf.Close()
		f, err := file.New(osf, tt.opts)
		if (err != nil) != tt.fails {
			t.Errorf("%s: %v", tt.name, err)
		}
		flags, err := unix.FcntlInt(osf.Fd(), unix.F_GETFL, 0)
		if err != nil {
			t.Fatal(err)
		}
		if got := flags&unix.O_DIRECT != 0; got != tt.wantDirect {
			t.Errorf("%s: O_DIRECT %v, want %v", tt.name, got, tt.wantDirect)
		}
		if f != nil && f.BlockSizes().Minimum > 0 != tt.wantDirect {
			t.Errorf("%s: block sizes %+v", tt.name, f.BlockSizes())
		}
	}
}

// BenchmarkDirect also shows that a request allocates nothing, wherever its memory lies.
func BenchmarkDirect(b *testing.B) {
	f := direct(b, 1<<20)
	if _, err := f.WriteAt(at(0, 1<<20), 0); err != nil {
		b.Fatal(err)
	}
	for _, n := range []int{4096, 128 << 10} {
		for _, skip := range []int{0, 16} {
			p := at(skip, n)
			for name, call := range map[string]func([]byte, int64) (int, error){"read": f.ReadAt, "write": f.WriteAt} {
				b.Run(name+"/"+strconv.Itoa(n)+"/"+strconv.Itoa(skip), func(b *testing.B) {
					b.ReportAllocs()
					for b.Loop() {
						if _, err := call(p, 0); err != nil {
							b.Fatal(err)
						}
					}
				})
			}
		}
	}
}
