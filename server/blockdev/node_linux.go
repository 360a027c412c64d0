package blockdev

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/nbdnl"
)

const (
	// nodePatience is how long the device node may take to appear; devtmpfs makes it before the
	// connect returns, udev or mdev soon after.
	nodePatience = 5 * time.Second
	// nodeInterval is how often it is looked for.
	nodeInterval = 10 * time.Millisecond
)

// readFirst opens the node at path, makes sure that it is the block device with that number
// ("43:96"), and reads n bytes from its beginning. The wait for the node ends with ctx; the open
// and the read end when the kernel lets them.
func readFirst(ctx context.Context, path, number string, n int) error {
	f, err := openNode(ctx, path)
	if err != nil {
		return err
	}
	defer f.Close() // Nothing was written.
	info, err := f.Stat()
	if err != nil {
		return err
	}
	got, ok := deviceNumber(info)
	if !ok {
		return fmt.Errorf("%s is not a block device", path)
	}
	if got != number {
		return fmt.Errorf("%s has the number %s, the kernel's device has %s: it is a stale node", path, got, number)
	}
	if _, err = f.ReadAt(make([]byte, n), 0); err != nil {
		return err
	}
	forgetErrors(f)
	return nil
}

// deviceNumber returns the number ("43:96") of a block device's node, and false for anything else.
func deviceNumber(node os.FileInfo) (string, bool) {
	st, ok := node.Sys().(*syscall.Stat_t)
	if !ok || st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return "", false
	}
	return fmt.Sprintf("%d:%d", unix.Major(uint64(st.Rdev)), unix.Minor(uint64(st.Rdev))), true
}

// forgetErrors has the kernel take the errors of writes to an index as seen. Before Linux 5.16 it
// keeps with the index what nobody has seen, also from one use to the next, and would tell it to
// the first who syncs the new device (invalidate_disk ends that).
func forgetErrors(f *os.File) {
	raw, err := f.SyscallConn()
	if err != nil {
		return
	}
	// This looks at the errors without writing anything (file_fdatawait_range); they are the
	// business of the former user.
	_ = raw.Control(func(fd uintptr) { _ = unix.SyncFileRange(int(fd), 0, 0, unix.SYNC_FILE_RANGE_WAIT_BEFORE) })
}

// syncFileSystem writes what the file system on an open device has not written yet, if there is
// one.
func syncFileSystem(dev nbdnl.Device) error {
	c, ok := dev.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var ioctl error
	// It swallows the errors of what it writes, which the server knows.
	err = raw.Control(func(fd uintptr) { ioctl = unix.IoctlSetInt(int(fd), unix.BLKFLSBUF, 0) })
	return errors.Join(err, os.NewSyscallError("ioctl BLKFLSBUF", ioctl))
}

// syncMount writes what the file system has not written yet whose mount is at path. It returns
// false if that mount can't be reached, as when another one covers it.
func syncMount(path string, id uint64) (bool, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return false, err
	}
	defer f.Close() // It was only looked at.
	raw, err := f.SyscallConn()
	if err != nil {
		return false, err
	}
	there := false
	var failed error
	err = raw.Control(func(fd uintptr) {
		var st unix.Statx_t
		if failed = unix.Statx(int(fd), "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &st); failed != nil {
			failed = os.NewSyscallError("statx", failed)
			return
		}
		if there = st.Mnt_id == id; there {
			failed = os.NewSyscallError("syncfs", unix.Syncfs(int(fd)))
		}
	})
	return there, errors.Join(err, failed)
}

// openNode opens a device node that may not be there yet. Read-only: the end of a write access
// would make udev look at the device again.
func openNode(ctx context.Context, path string) (f *os.File, err error) {
	err = awaitNode(ctx, func() error {
		f, err = os.OpenFile(path, os.O_RDONLY, 0)
		return err
	})
	return f, err
}

// awaitNode calls try until it does not find that a node is missing.
func awaitNode(ctx context.Context, try func() error) error {
	err := try()
	if !errors.Is(err, os.ErrNotExist) {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, nodePatience,
		fmt.Errorf("it does not appear: is /dev not the kernel's devtmpfs, as in a container?"))
	defer cancel()
	look := time.NewTicker(nodeInterval)
	defer look.Stop()
	for errors.Is(err, os.ErrNotExist) {
		select {
		case <-look.C:
			err = try()
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", err, context.Cause(ctx))
		}
	}
	return err
}
