package nbdnl

import (
	"errors"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// maxAttribute is more than the kernel shows in any file that is read here, in bytes.
const maxAttribute = 4096

// readAttribute reads a file of sysfs, which gives all it has in one read. A look at a device takes dozens of them, and package os
// makes twice as many system calls of each, for it asks whether the file can be waited for, how long it is, and for its end.
func readAttribute(path string) ([]byte, error) {
	var content []byte
	err := withFile(path, func(fd int) (err error) {
		content, err = readOnce(fd)
		return err
	})
	return content, err
}

// fileNumber returns what tells a file of sysfs from another one that is made in its place.
func fileNumber(path string) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return st.Ino, nil
}

// readOwner returns the number of a `pid` file, and its content if that is wanted.
func readOwner(path string, wanted bool) (birth uint64, pid []byte, err error) {
	err = withFile(path, func(fd int) error {
		var st unix.Stat_t
		err := unix.Fstat(fd, &st)
		if err == nil && wanted {
			pid, err = readOnce(fd)
		}
		birth = st.Ino
		return err
	})
	return birth, pid, err
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
