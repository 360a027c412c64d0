package machine

import (
	"errors"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// maxAttribute is more than the kernel shows in any file that is read here, in bytes.
const maxAttribute = 4096

// ReadAttribute reads a file of sysfs, which gives all it has in one read. A look at a device takes
// dozens of them, and package os makes twice as many system calls of each, for it asks whether the
// file can be waited for, how long it is, and for its end.
func ReadAttribute(path string) ([]byte, error) {
	var content []byte
	err := withFile(path, func(fd int) (err error) {
		content, err = readOnce(fd)
		return err
	})
	return content, err
}

// IncarnationOf returns the incarnation of what a file of sysfs stands for, or 0 and an error. It
// does not follow a link, and does not read the file.
func IncarnationOf(path string) (Incarnation, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return 0, &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	return Incarnation(st.Ino), nil
}

// ReadIncarnation returns the incarnation of what a file of sysfs stands for, and the file's
// content if that is wanted.
func ReadIncarnation(path string, wanted bool) (now Incarnation, content []byte, err error) {
	err = withFile(path, func(fd int) error {
		var st unix.Stat_t
		err := unix.Fstat(fd, &st)
		if err == nil && wanted {
			content, err = readOnce(fd)
		}
		now = Incarnation(st.Ino)
		return err
	})
	return now, content, err
}

func withFile(path string, use func(fd int) error) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	for errors.Is(err, unix.EINTR) {
		fd, err = unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	if err := use(fd); err != nil {
		return &os.PathError{Op: "read", Path: path, Err: err}
	}
	return nil
}

func readOnce(fd int) ([]byte, error) {
	var b [maxAttribute]byte
	for {
		n, err := unix.Read(fd, b[:])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return slices.Clone(b[:max(n, 0)]), err
	}
}
