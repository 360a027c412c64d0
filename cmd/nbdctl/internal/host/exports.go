package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
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

// An ExportsControl answers who asks a process that serves exports, and no device.
type ExportsControl struct{ c *control }

// ControlExports answers on l. exports returns what there is, and handOver has a process of another
// program serve in the place of this one, and returns its number. The error of both is ErrMoved if
// another process serves already.
func ControlExports(
	l net.Listener, exports func() ([]ExportStatus, error),
	handOver func(ctx context.Context, program *os.File) (int, error),
) *ExportsControl {
	return &ExportsControl{newControl(l, func(ctx context.Context, req request) (*Status, error) {
		switch req.Op {
		case opExports:
			all, err := exports()
			return &Status{Exports: all}, err
		case opHandOver:
			pid, err := handOver(ctx, req.File)
			return &Status{Record: Record{PID: pid}}, err
		}
		return nil, errUnknownOp
	})}
}

// Listener returns what it answers on.
func (c *ExportsControl) Listener() net.Listener { return c.c.listener }

// Close ends it, and closes the listener.
func (c *ExportsControl) Close() { c.c.close(errEnding) }

// Leave ends it when all have their answers, and closes the listener: another process answers.
func (c *ExportsControl) Leave() {
	c.c.leave()
	c.c.drain()
}

// AskExports asks the server that answers on the socket at path.
func AskExports(ctx context.Context, path string) ([]ExportStatus, error) {
	ctx, cancel := within(ctx, controlTimeout)
	defer cancel()
	s, err := askServer(ctx, path, request{Op: opExports})
	if err != nil {
		return nil, err
	}
	return s.Exports, nil
}

// UpgradeServer has the server that answers on the socket at path replaced by a process of this
// program, and returns the number of that. After an error the server goes on as if nothing had
// been, unless the error says otherwise.
func UpgradeServer(ctx context.Context, path string) (pid int, err error) {
	program, err := os.Open("/proc/self/exe")
	if err != nil {
		return 0, err
	}
	defer program.Close()
	s, err := askServer(ctx, path, request{Op: opHandOver, File: program})
	if err != nil {
		return 0, err
	}
	return s.Record.PID, nil
}

// askServer asks the server, and if another process takes it over meanwhile, that.
func askServer(ctx context.Context, path string, req request) (s *Status, err error) {
	for range maxMoves {
		if s, err = askServerOnce(ctx, path, req); !errors.Is(err, ErrMoved) {
			break
		}
	}
	return s, err
}

func askServerOnce(ctx context.Context, path string, req request) (*Status, error) {
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
	req.Version = controlVersion
	err = req.send(c)
	var answer response
	if err == nil {
		err = json.NewDecoder(io.LimitReader(c, exportsLimit)).Decode(&answer)
	}
	switch {
	case ctx.Err() != nil:
		return nil, fmt.Errorf("%s: %w", path, context.Cause(ctx))
	case err != nil:
		return nil, fmt.Errorf("%s: no answer that can be read: %w; is it that of a server's --control?", path, err)
	case answer.Moved:
		return nil, ErrMoved
	case answer.Error != "":
		return nil, &exit.Error{Code: max(answer.Code, exit.Failure), Err: errors.New(answer.Error)}
	case answer.Status == nil:
		return nil, fmt.Errorf("%s: an answer without what was asked for", path)
	}
	return answer.Status, nil
}
