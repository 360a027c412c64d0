package wire_test

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"
	"testing"

	"github.com/nbdctl/nbdctl/server/wire"
)

func TestErrnoOf(t *testing.T) {
	tests := []struct {
		err  error
		want uint32
	}{
		{nil, 0},
		{syscall.EPERM, 1},
		{syscall.EACCES, 1},
		{syscall.EROFS, 1},
		{fs.ErrPermission, 1},
		{syscall.EIO, 5},
		{syscall.ENOMEM, 12},
		{syscall.EINVAL, 22},
		{syscall.ENOSPC, 28},
		{syscall.EDQUOT, 28},
		{syscall.EFBIG, 28},
		{syscall.EOVERFLOW, 75},
		{syscall.ENOTSUP, 95},
		{syscall.EOPNOTSUPP, 95},
		{syscall.ENOSYS, 95},
		{errors.ErrUnsupported, 95},
		{syscall.ESHUTDOWN, 108},
		{syscall.EBADF, 5},
		{syscall.ETIMEDOUT, 5},
		{io.EOF, 5},
		{io.ErrUnexpectedEOF, 5},
		{errors.New("anything else"), 5},
		{&os.PathError{Op: "write", Path: "disk.img", Err: syscall.ENOSPC}, 28},
		{fmt.Errorf("layer: %w", fmt.Errorf("file: %w", syscall.EOVERFLOW)), 75},
		{errors.Join(errors.New("first"), syscall.ENOSPC), 28},
	}
	for _, tt := range tests {
		if got := wire.ErrnoOf(tt.err); uint32(got) != tt.want {
			t.Errorf("%v gives %d, want %d", tt.err, got, tt.want)
		}
	}
}
