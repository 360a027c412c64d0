package file

import (
	"golang.org/x/sys/unix"
)

func (f *File) sync() error {
	return f.control(unix.Fdatasync)
}

// writeDurably writes and syncs these bytes only. The error matches
// errors.ErrUnsupported where that is not to be had.
func (f *File) writeDurably(p []byte, off int64) (done int, err error) {
	for done < len(p) {
		err := f.control(func(fd int) error {
			n, err := unix.Pwritev2(fd, [][]byte{p[done:]}, off+int64(done), unix.RWF_DSYNC)
			if err != nil {
				return err
			}
			if n == 0 {
				return unix.EIO
			}
			done += n
			return nil
		})
		if err != nil {
			return done, err
		}
	}
	return done, nil
}
