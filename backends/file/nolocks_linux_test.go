package file_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/backends/file"
)

// TestNoLocks is about file systems that have no locks: nothing is done there unless the
// caller says so.
func TestNoLocks(t *testing.T) {
	path := image(t, make([]byte, 4096))
	for _, errno := range []syscall.Errno{unix.ENOLCK, unix.EOPNOTSUPP, unix.ENOSYS, unix.EINVAL} {
		file.FailLocks(t, errno)
		for _, readOnly := range []bool{false, true} {
			_, err := file.Open(path, file.Options{ReadOnly: readOnly})
			var none *file.NoLocksError
			if !errors.As(err, &none) || none.Path != path || none.Err != errno ||
				!errors.Is(err, errors.ErrUnsupported) ||
				!strings.Contains(err.Error(), "its file system has no locks") {
				t.Errorf("%v: %v, want a NoLocksError", errno, err)
			}
			open(t, path, file.Options{ReadOnly: readOnly, NoLock: true}).Close()
		}
	}
	file.FailLocks(t, unix.EIO) // tells nothing of what there is
	var none *file.NoLocksError
	if _, err := file.Open(path, file.Options{}); !errors.Is(err, unix.EIO) || errors.As(err, &none) {
		t.Errorf("an I/O error: %v", err)
	}
	created := filepath.Join(t.TempDir(), "disk.img")
	file.FailLocks(t, unix.ENOLCK)
	if _, err := file.Open(created, file.Options{Create: true, Size: 4096}); !errors.As(err, &none) {
		t.Errorf("created: %v", err)
	}
	if _, err := os.Stat(created); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a refused file is there: %v", err)
	}
}
