package file_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/file"
)

// wantReadOnly checks an error of opening a file that can be read and not written.
func wantReadOnly(t *testing.T, err error, path string, cause error, says string) {
	t.Helper()
	var readOnly *file.ReadOnlyError
	if !errors.Is(err, syscall.EROFS) || !errors.As(err, &readOnly) || readOnly.Path != path || !errors.Is(err, cause) {
		t.Errorf("error %v, want a ReadOnlyError of %s that is EROFS and %v", err, path, cause)
	} else if !strings.Contains(err.Error(), says) {
		t.Errorf("it says %q, want %q in it", err, says)
	}
}

// wantReadable checks that what can't be written is a device that is read-only.
func wantReadable(t *testing.T, f *file.File, err error) {
	t.Helper()
	if err != nil {
		t.Errorf("read-only: %v", err)
		return
	}
	defer f.Close()
	if f.Caps()&backends.CapWrite != 0 {
		t.Error("it offers to be written")
	}
	if _, err := f.ReadAt(make([]byte, 512), 0); err != nil {
		t.Error(err)
	}
}

// TestReadOnlyMemory seals the memory behind a file: the kernel still opens it for writing.
func TestReadOnlyMemory(t *testing.T) {
	for _, seal := range []int{unix.F_SEAL_WRITE, unix.F_SEAL_FUTURE_WRITE} {
		fd, err := unix.MemfdCreate("sealed", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
		if err != nil {
			t.Fatal(err)
		}
		osf := os.NewFile(uintptr(fd), "sealed")
		defer osf.Close()
		if err := osf.Truncate(4096); err != nil {
			t.Fatal(err)
		}
		open(t, fmt.Sprintf("/proc/self/fd/%d", fd), file.Options{}).Close()
		if _, err := unix.FcntlInt(osf.Fd(), unix.F_ADD_SEALS, seal); err != nil {
			t.Fatal(err)
		}
		path := fmt.Sprintf("/proc/self/fd/%d", fd)
		_, err = file.Open(path, file.Options{})
		wantReadOnly(t, err, path, syscall.EPERM, "sealed")
		_, err = file.New(osf, file.Options{})
		wantReadOnly(t, err, "sealed", syscall.EPERM, "sealed")
		f, err := file.New(osf, file.Options{ReadOnly: true})
		wantReadable(t, f, err)
	}
}

// TestReadOnlyAttributes shows what is said of files that their attributes protect, also
// when those come after the file was opened.
func TestReadOnlyAttributes(t *testing.T) {
	for _, tt := range []struct {
		attribute, says string
		late            bool // refused, too, where the file was open for writing before
	}{{"i", "it is immutable (chattr +i)", true}, {"a", "it is append-only (chattr +a)", false}} {
		path := image(t, make([]byte, 4096))
		osf, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer osf.Close()
		if out, err := exec.Command("chattr", "+"+tt.attribute, path).CombinedOutput(); err != nil {
			t.Skipf("chattr: %v: %s", err, out) // not root, or not on this file system
		}
		t.Cleanup(func() { exec.Command("chattr", "-"+tt.attribute, path).Run() })
		_, err = file.Open(path, file.Options{})
		wantReadOnly(t, err, path, fs.ErrPermission, tt.says)
		f, err := file.Open(path, file.Options{ReadOnly: true})
		wantReadable(t, f, err)
		f, err = file.New(osf, file.Options{})
		if tt.late {
			wantReadOnly(t, err, path, fs.ErrPermission, tt.says)
		} else if err != nil {
			t.Errorf("+%s after the open: %v", tt.attribute, err)
		} else if _, err := f.WriteAt([]byte{1}, 0); err != nil {
			t.Errorf("+%s after the open: write: %v", tt.attribute, err)
		}
	}
}

// TestReadOnlyPermission is about files that may be read but not written, and those that
// may be neither.
func TestReadOnlyPermission(t *testing.T) {
	if os.Geteuid() == 0 {
		asNobody(t, "TestReadOnlyPermission")
		return
	}
	path := image(t, make([]byte, 4096))
	for mode, readable := range map[fs.FileMode]bool{0o400: true, 0: false} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		_, err := file.Open(path, file.Options{})
		if readable {
			wantReadOnly(t, err, path, fs.ErrPermission, "permission denied")
		} else if !errors.Is(err, fs.ErrPermission) || errors.Is(err, syscall.EROFS) {
			t.Errorf("mode %v: %v, want that it is not permitted", mode, err)
		}
	}
}

// asNobody runs a test of this package once more, without privileges.
func asNobody(t *testing.T, name string) {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "nobody-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	self, err := os.ReadFile("/proc/self/exe")
	if err == nil {
		test := filepath.Join(dir, "test")
		err = errors.Join(os.WriteFile(test, self, 0o755), os.Chmod(dir, 0o777), os.Chmod(test, 0o755))
	}
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(dir, "test"), "-test.v", "-test.run", "^"+name+"$")
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "TMPDIR="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: "+name) {
		t.Errorf("as nobody: %v\n%s", err, out)
	}
}

// TestReadOnlyLimit sets a limit for the length of files below that of the image: writes
// beyond it would fail although the image has the bytes.
func TestReadOnlyLimit(t *testing.T) {
	// Far more than package testing writes to files of its own.
	const limit = 16 << 20
	path := image(t, nil)
	if err := os.Truncate(path, 2*limit); err != nil {
		t.Fatal(err)
	}
	f := open(t, image(t, make([]byte, 4096)), file.Options{})
	withLimit(t, limit)

	_, err := file.Open(path, file.Options{})
	wantReadOnly(t, err, path, syscall.EFBIG,
		"the first 16777216 bytes of a file only (ulimit -f), and it has 33554432")
	ro, err := file.Open(path, file.Options{ReadOnly: true})
	wantReadable(t, ro, err)

	created := filepath.Join(t.TempDir(), "disk.img")
	_, err = file.Open(created, file.Options{Create: true, Size: 2 * limit})
	if !errors.Is(err, syscall.EFBIG) ||
		!strings.Contains(err.Error(), "a size of 33554432 bytes") ||
		!strings.Contains(err.Error(), "ulimit -f") {
		t.Errorf("created: %v", err)
	}
	if _, err := os.Stat(created); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it is there: %v", err)
	}

	// A device that has room goes on, and grows as far as it may.
	if err := f.Resize(limit); err != nil {
		t.Error(err)
	}
	err = f.Resize(limit + 1)
	if !errors.Is(err, syscall.EFBIG) || !strings.Contains(err.Error(), "ulimit -f") || f.Size() != limit {
		t.Errorf("resize beyond the limit: size %d, %v", f.Size(), err)
	}
	if _, err := f.WriteAt([]byte{1}, limit-1); err != nil {
		t.Error(err)
	}
	withLimit(t, limit/2) // The process lives: Go takes no notice of SIGXFSZ.
	if _, err := f.WriteAt([]byte{1}, limit-1); !errors.Is(err, syscall.EFBIG) {
		t.Errorf("write beyond a new limit: %v", err)
	}
}

// withLimit lets this process write the first n bytes of files, until the end of the test.
func withLimit(t *testing.T, n uint64) {
	t.Helper()
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_FSIZE, &old); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: n, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &old); err != nil {
			t.Error(err)
		}
	})
}

// TestReadOnlyDescriptor is about descriptors that can't be written: what they are is a
// device that is read-only.
func TestReadOnlyDescriptor(t *testing.T) {
	osf, err := os.Open(image(t, make([]byte, 4096)))
	if err != nil {
		t.Fatal(err)
	}
	f, err := file.New(osf, file.Options{})
	wantReadable(t, f, err)
}

// TestNoFileThatLong asks for a length that the file system does not have.
func TestNoFileThatLong(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.img")
	f, err := file.Open(path, file.Options{Create: true, Size: 1<<63 - 1})
	if err == nil {
		f.Discard()
		t.Skip("this file system has them")
	}
	says := "a size of 9223372036854775807 bytes: its file system has no files that long"
	if !errors.Is(err, syscall.EFBIG) || !strings.Contains(err.Error(), says) {
		t.Error(err)
	}
}
