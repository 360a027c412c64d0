package file_test

import (
	"bufio"
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/backendtest"
	"github.com/nbdctl/nbdctl/backends/file"
)

// sectors is how much of a file is on disk.
func sectors(t *testing.T, path string) int64 {
	t.Helper()
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return st.Sys().(*syscall.Stat_t).Blocks
}

func TestHolesGiveSpaceBack(t *testing.T) { bothWays(t, testHolesGiveSpaceBack) }

func testHolesGiveSpaceBack(t *testing.T, direct bool) {
	const size = 1 << 20
	path := image(t, bytes.Repeat([]byte{1}, size))
	f := open(t, path, file.Options{Direct: direct})
	if f.Caps()&backends.CapTrim == 0 {
		t.Skip("this file system has no holes")
	}
	f.Sync()
	full := sectors(t, path)
	if err := f.Trim(0, size/2); err != nil {
		t.Fatal(err)
	}
	half := sectors(t, path)
	if err := f.Zero(size/2, size/4, 0); err != nil {
		t.Fatal(err)
	}
	quarter := sectors(t, path)
	if err := f.Zero(0, size, backends.ZeroNoHole); err != nil {
		t.Fatal(err)
	}
	again := sectors(t, path)
	if full < size/512 || half > full*5/8 || quarter > full*3/8 || again < size/512 {
		t.Errorf("sectors: %d, half trimmed %d, a quarter more zeroed %d, zeroed without holes %d",
			full, half, quarter, again)
	}
	if st, _ := os.Stat(path); st.Size() != size {
		t.Errorf("the file is %d bytes long now", st.Size())
	}
}

func TestExtents(t *testing.T) { bothWays(t, testExtents) }

func testExtents(t *testing.T, direct bool) {
	const size = 1 << 30
	f := open(t, filepath.Join(t.TempDir(), "disk.img"), file.Options{Create: true, Size: size, Direct: direct})
	if f.Caps()&backends.CapTrim == 0 {
		t.Skip("this file system has no holes")
	}
	f.WriteAt(bytes.Repeat([]byte{1}, 1<<20), 1<<20)
	f.WriteAt(bytes.Repeat([]byte{1}, 1<<20), size-1<<20)
	var got []backends.Extent
	if err := f.Extents(4096, size-8192, func(e backends.Extent) bool {
		got = append(got, e)
		return true
	}); err != nil {
		t.Fatal(err)
	}
	want := []backends.Extent{
		{Offset: 4096, Length: 1<<20 - 4096, Hole: true, Zero: true},
		{Offset: 1 << 20, Length: 1 << 20},
		{Offset: 2 << 20, Length: size - 3<<20, Hole: true, Zero: true},
		{Offset: size - 1<<20, Length: 1<<20 - 4096},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("extents (-want +got):\n%s", d)
	}
}

func TestLocks(t *testing.T) { bothWays(t, testLocks) }

func testLocks(t *testing.T, direct bool) {
	for _, tt := range []struct {
		name          string
		first, second bool // read-only
		ok            bool
	}{
		{"writers", false, false, false},
		{"reader after writer", false, true, false},
		{"writer after reader", true, false, false},
		{"readers", true, true, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := image(t, make([]byte, 4096))
			first := open(t, path, file.Options{ReadOnly: tt.first, Direct: direct})
			second, err := file.Open(path, file.Options{ReadOnly: tt.second, Direct: direct})
			if tt.ok {
				if err != nil {
					t.Fatal(err)
				}
				second.Close()
				return
			}
			var locked *file.LockedError
			if !errors.Is(err, file.ErrLocked) || !errors.As(err, &locked) {
				t.Fatalf("%v, want ErrLocked", err)
			}
			if len(locked.Holders) != 1 || locked.Holders[0].PID != os.Getpid() || locked.Path != path {
				t.Errorf("%+v, want this process, %d", locked, os.Getpid())
			}
			if !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), locked.Holders[0].Comm) {
				t.Errorf("%q names neither the file nor who has it", err)
			}
			// Other descriptors of the file come and go: POSIX locks would be lost now.
			other, _ := os.Open(path)
			other.Close()
			if _, err := file.Open(path, file.Options{Direct: direct}); !errors.Is(err, file.ErrLocked) {
				t.Errorf("after another descriptor was closed: %v", err)
			}
			first.Close()
			if f, err := file.Open(path, file.Options{ReadOnly: tt.second, Direct: direct}); err != nil {
				t.Errorf("after Close: %v", err)
			} else {
				f.Close()
			}
		})
	}
}

// A refused file that was to be created is not the one that is removed.
func TestLockedWithCreate(t *testing.T) {
	path := image(t, make([]byte, 4096))
	open(t, path, file.Options{})
	if _, err := file.Open(path, file.Options{Create: true, Size: 4096}); !errors.Is(err, file.ErrLocked) {
		t.Errorf("%v, want ErrLocked", err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Error(err)
	}
}

// Those who create, discard and open the same file never take it away from each
// other.
func TestDiscardUnderOthers(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.img")
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for range 200 {
				f, err := file.Open(path, file.Options{Create: w%2 == 0, Size: 4096})
				var size *file.SizeError
				switch {
				case errors.Is(err, file.ErrLocked),
					errors.As(err, &size),
					errors.Is(err, fs.ErrExist),
					errors.Is(err, fs.ErrNotExist):
					continue
				case err != nil:
					t.Error(err)
					continue
				}
				if _, err := os.Stat(path); err != nil {
					t.Errorf("a file in use is gone: %v", err)
				}
				f.Discard()
			}
		})
	}
	wg.Wait()
}

// A lock is passed on with the descriptor, and the new holder is who is named.
func TestLockIsInherited(t *testing.T) {
	path := image(t, make([]byte, 4096))
	osf, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	f, err := file.New(osf, file.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	child := exec.Command("cat")
	child.ExtraFiles = []*os.File{osf}
	in, _ := child.StdinPipe()
	out, _ := child.StdoutPipe()
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	// When it answers it runs, with our descriptor.
	in.Write([]byte("ready\n"))
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	f.Close()
	_, err = file.Open(path, file.Options{})
	var locked *file.LockedError
	if !errors.As(err, &locked) {
		t.Fatalf("%v, want a LockedError", err)
	}
	want := []file.Holder{{PID: child.Process.Pid, Comm: "cat"}}
	if d := cmp.Diff(want, locked.Holders); d != "" {
		t.Errorf("holders (-want +got):\n%s", d)
	}
	in.Close()
	child.Wait()
	open(t, path, file.Options{})
}

// asQEMU locks a file as qemu does, until the end of the test: shared bytes first
// (100+n: uses permission n, 200+n: denies it), then a look for what conflicts.
func asQEMU(t *testing.T, path, who string) (conflict bool) {
	t.Helper()
	const read, write, resize = 0, 1, 3
	uses, denies := []int64{read}, []int64{write, resize}
	if who == "writer" {
		uses = []int64{read, write, resize}
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	try := func(cmd int, kind int16, bytes []int64, base int64) {
		for _, b := range bytes {
			l := unix.Flock_t{Type: kind, Start: base + b, Len: 1}
			err := unix.FcntlFlock(f.Fd(), cmd, &l)
			conflict = conflict || err != nil || cmd == unix.F_OFD_GETLK && l.Type != unix.F_UNLCK
		}
	}
	try(unix.F_OFD_SETLK, unix.F_RDLCK, uses, 100)
	try(unix.F_OFD_SETLK, unix.F_RDLCK, denies, 200)
	try(unix.F_OFD_GETLK, unix.F_WRLCK, uses, 200)
	try(unix.F_OFD_GETLK, unix.F_WRLCK, denies, 100)
	return conflict
}

func TestLocksOfQEMU(t *testing.T) {
	for _, tt := range []struct {
		who      string
		readOnly bool
		conflict bool
	}{{"writer", false, true}, {"writer", true, true}, {"reader", false, true}, {"reader", true, false}} {
		path := image(t, make([]byte, 4096))
		f := open(t, path, file.Options{ReadOnly: tt.readOnly})
		if got := asQEMU(t, path, tt.who); got != tt.conflict {
			t.Errorf("qemu as %s after us, read-only %v: conflict %v, want %v", tt.who, tt.readOnly, got, tt.conflict)
		}
		f.Close()

		path = image(t, make([]byte, 4096))
		asQEMU(t, path, tt.who)
		f, err := file.Open(path, file.Options{ReadOnly: tt.readOnly})
		var locked *file.LockedError
		if got := errors.As(err, &locked); got != tt.conflict || got && len(locked.Holders) != 1 {
			t.Errorf("we, read-only %v, after qemu as %s: %v, want a conflict: %v",
				tt.readOnly, tt.who, err, tt.conflict)
		}
		if err == nil {
			f.Close()
		}
	}
}

// loop makes a block device of a file, if this machine lets us.
func loop(t testing.TB, size int64) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("block devices are made by root only")
	}
	path := filepath.Join(t.TempDir(), "backing")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("losetup", "--find", "--show", path).CombinedOutput()
	if err != nil {
		t.Skipf("losetup: %v: %s", err, out)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", dev).CombinedOutput(); err != nil {
			t.Errorf("losetup: %v: %s", err, out)
		}
	})
	return dev
}

func TestBlockDevice(t *testing.T) { bothWays(t, testBlockDevice) }

func testBlockDevice(t *testing.T, direct bool) {
	const size = 8 << 20
	dev := loop(t, size)
	f := open(t, dev, file.Options{Size: size, Direct: direct})
	if want := (backends.BlockSizes{Minimum: 512, Preferred: 512}); f.Size() != size || f.BlockSizes() != want {
		t.Errorf("size %d, %+v", f.Size(), f.BlockSizes())
	}
	if f.Caps()&backends.CapTrim == 0 {
		t.Errorf("a loop device discards, but is not offered as one: %v", f.Caps())
	}

	_, err := file.Open(dev, file.Options{Direct: direct})
	var locked *file.LockedError
	if !errors.As(err, &locked) {
		t.Fatalf("second writer: %v, want a LockedError", err)
	}
	if len(locked.Holders) != 1 || locked.Holders[0].PID != os.Getpid() {
		t.Errorf("%+v, want this process, %d", locked, os.Getpid())
	}

	// A trim of parts of sectors drops the whole ones inside.
	f.WriteAt(bytes.Repeat([]byte{1}, 4096), 0)
	if err := f.Trim(100, 2000); err != nil {
		t.Fatal(err)
	}
	if err := f.Trim(3000, 100); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 4096)
	f.ReadAt(got, 0)
	want := bytes.Repeat([]byte{1}, 4096)
	clear(want[512:2048])
	if !bytes.Equal(got, want) {
		t.Error("trim of parts of sectors")
	}
	f.Close()

	ro := open(t, dev, file.Options{ReadOnly: true, Direct: direct})
	ro2 := open(t, dev, file.Options{ReadOnly: true, Direct: direct})
	ro.Close()
	ro2.Close()

	backendtest.Test(t, func(t testing.TB) backends.Backend {
		return open(t, dev, file.Options{Direct: direct})
	}, backendtest.Options{Operations: 200})
}
