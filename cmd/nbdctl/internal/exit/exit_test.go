package exit

import (
	"errors"
	"fmt"
	"io/fs"
	"testing"

	"github.com/nbdctl/nbdctl/backends/file"
	"github.com/nbdctl/nbdctl/nbdnl"
)

// TestOf holds the documented codes to the errors that libraries return.
func TestOf(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want Code
	}{
		{nil, OK},
		{errors.New("boom"), Failure},
		{fs.ErrNotExist, Failure}, // a missing image; a missing device has a code of its own
		{Usagef("--size %s", "x"), Usage},
		{nbdnl.ErrNotConnected, NotFound},
		{nbdnl.ErrNotOwner, Permission},
		{fs.ErrPermission, Permission},
		{nbdnl.ErrNoDriver, Unsupported},
		{&nbdnl.UnsupportedError{Setting: "flush"}, Unsupported},
		{&nbdnl.BusyError{}, Busy},
		{file.ErrLocked, Busy},
		{fmt.Errorf("wrapped: %w", With(NotFound, "no nbd3")), NotFound},
		{errors.Join(With(Busy, "first"), With(Usage, "second")), Busy},
	} {
		if got := Of(tt.err); got != tt.want {
			t.Errorf("Of(%v) is %d, want %d", tt.err, got, tt.want)
		}
	}
}
