package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"syscall"
	"time"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/server"
)

// opExports asks a process that serves exports, and no device.
const opExports = "exports"

// exportsLimit is how long its answer may be, in bytes: a few KiB for each export.
const exportsLimit = 64 << 20

// An ExportStatus is what such a process tells of one of its exports.
type ExportStatus struct {
	Name string `json:"name"`
	// Since is when it was opened: the counts are of what was served from then on.
	Since   time.Time    `json:"since"`
	Size    int64        `json:"size"` // bytes
	Clients int          `json:"clients"`
	Stats   server.Stats `json:"stats"`
	// LastError is the newest request that failed, nil if none did.
	LastError *Failure `json:"last_error"`
}

// AnswerExports answers on l who asks for the exports. stop ends that, and closes l.
func AnswerExports(l net.Listener, exports func() []ExportStatus) (stop func()) {
	c := newControl(l, func(_ context.Context, req request) (*Status, error) {
		if req.Op != opExports {
			return nil, errUnknownOp
		}
		return &Status{Exports: exports()}, nil
	})
	return func() { c.close(errEnding) }
}

// AskExports asks the server that answers on the socket at path.
func AskExports(ctx context.Context, path string) ([]ExportStatus, error) {
	ctx, cancel := within(ctx, controlTimeout)
	defer cancel()
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil, exit.With(exit.NotFound, "no server answers at %s; is it that of its --control?", path)
	}
	if err != nil {
		return nil, err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	err = json.NewEncoder(c).Encode(request{Version: controlVersion, Op: opExports})
	var answer response
	if err == nil {
		err = json.NewDecoder(io.LimitReader(c, exportsLimit)).Decode(&answer)
	}
	switch {
	case ctx.Err() != nil:
		return nil, fmt.Errorf("%s: %w", path, context.Cause(ctx))
	case err != nil:
		return nil, fmt.Errorf("%s: no answer that can be read: %w; is it that of a server's --control?", path, err)
	case answer.Error != "":
		return nil, &exit.Error{Code: max(answer.Code, exit.Failure), Err: errors.New(answer.Error)}
	case answer.Status == nil:
		return nil, fmt.Errorf("%s: an answer without what was asked for", path)
	}
	return answer.Status.Exports, nil
}
