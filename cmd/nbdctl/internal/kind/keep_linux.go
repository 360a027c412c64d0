package kind

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// keepFile returns a copy of an open file, with its lock, and a witness: the same file opened once
// more, and never synced. An error of writing back is told once to each of the two, so what a
// process was told that has died, its successor hears from the witness.
func keepFile(f *os.File) ([]*os.File, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd, failed := -1, error(nil)
	err = raw.Control(func(open uintptr) { fd, failed = unix.FcntlInt(open, unix.F_DUPFD_CLOEXEC, 0) })
	if err := errors.Join(err, failed); err != nil {
		return nil, err
	}
	copied := os.NewFile(uintptr(fd), f.Name())
	witness, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		copied.Close()
		return nil, err
	}
	return []*os.File{copied, witness}, nil
}
