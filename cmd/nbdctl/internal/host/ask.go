package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"path/filepath"
	"syscall"
	"time"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/parcel"
	"github.com/nbdctl/nbdctl/server"
)

// Status asks the process of e about itself. It needs to be root.
func (e *Entry) Status(ctx context.Context) (*Status, error) {
	ctx, cancel := within(ctx, controlTimeout)
	defer cancel()
	return e.ask(ctx, request{Op: opStatus})
}

// Stats asks the process of e for the counts of each connection, latencies
// included.
func (e *Entry) Stats(ctx context.Context) ([]server.Stats, error) {
	ctx, cancel := within(ctx, controlTimeout)
	defer cancel()
	s, err := e.ask(ctx, request{Op: opStats})
	if err != nil {
		return nil, err
	}
	return s.Stats, nil
}

// Change has the process of e change its device, and returns what that is
// afterwards.
func (e *Entry) Change(ctx context.Context, c Change) (*Status, error) {
	// One that is stopped shows that sooner when asked for less.
	if _, err := e.Status(ctx); err != nil {
		return nil, err
	}
	ctx, cancel := within(ctx, actionTimeout+controlTimeout)
	defer cancel()
	return e.ask(ctx, request{Op: opChange, Change: &c})
}

// Loss asks the process of e which writes were lost since the connect. The kernel
// may have acknowledged them. A process of an older nbdctl tells it once.
func (e *Entry) Loss(ctx context.Context) (string, error) {
	ctx, cancel := within(ctx, controlTimeout)
	defer cancel()
	s, err := e.ask(ctx, request{Op: opLoss})
	if err != nil {
		return "", err
	}
	return s.Loss, nil
}

// Kick has the process of e end its device at once, failing what waits for it.
// It does not wait for the process.
func (e *Entry) Kick(ctx context.Context) error {
	_, err := e.ask(ctx, request{Op: opKick})
	return err
}

// within bounds the wait for an answer.
func within(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	late := fmt.Errorf("not within %s; it may be stopped or stuck, then nbdctl kick frees the device", d)
	return context.WithTimeoutCause(ctx, d, late)
}

// maxMoves bounds how often a device can be taken over while one thing is asked.
const maxMoves = 10

// ask sends a request and waits for the answer. Errors that the process
// answered with are *exit.Error. If another process takes the device over meanwhile, it is asked.
func (e *Entry) ask(ctx context.Context, req request) (*Status, error) {
	for range maxMoves {
		s, err := e.askOne(ctx, req)
		if !errors.Is(err, ErrMoved) {
			return s, err
		}
		if r, err := readRecord(e.dir); err == nil {
			e.Record = r
		}
	}
	return nil, ErrMoved
}

func (e *Entry) askOne(ctx context.Context, req request) (*Status, error) {
	req.Version = controlVersion
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", filepath.Join(e.dir, "ctl"))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil, e.untimely()
	}
	if err != nil {
		return nil, fmt.Errorf("asking pid %d: %w", e.PID, err)
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := req.send(c); err != nil {
		return nil, e.unanswered(ctx, err)
	}
	var answer json.RawMessage
	if err := json.NewDecoder(io.LimitReader(c, controlLimit)).Decode(&answer); err != nil {
		return nil, e.unanswered(ctx, err)
	}
	return e.read(req.Op, answer)
}

// send sends the request, with its descriptor if it has one.
func (req request) send(c net.Conn) error {
	if req.File == nil {
		return json.NewEncoder(c).Encode(req)
	}
	b, err := json.Marshal(req)
	if err != nil {
		return err
	}
	return parcel.SendFile(c, append(b, '\n'), req.File)
}

// read takes an answer for what this version knows of it.
func (e *Entry) read(op string, answer []byte) (*Status, error) {
	var resp response
	err := json.Unmarshal(answer, &resp)
	if err == nil && resp.Error == "" && resp.Status == nil && op != opKick && op != opHandOver {
		err = errors.New("nothing that was asked for is in it")
	}
	if version := versionOf(answer); err != nil && version > controlVersion {
		return nil, exit.With(exit.Unsupported,
			"pid %d answers in version %d of the control protocol, of which this nbdctl knows up to %d; "+
				"use the nbdctl that connected %s, or a newer one: %w",
			e.PID, version, controlVersion, e.Device(), err)
	}
	switch {
	case err != nil:
		return nil, fmt.Errorf("pid %d gives an answer that can't be read: %w", e.PID, err)
	case resp.Moved:
		return nil, ErrMoved
	case resp.Error != "":
		return nil, &exit.Error{Code: max(resp.Code, exit.Failure), Err: errors.New(resp.Error)}
	}
	return resp.Status, nil
}

// unanswered explains a conversation that came to nothing.
func (e *Entry) unanswered(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	} else if e.Ended() {
		return e.untimely()
	}
	return fmt.Errorf("pid %d does not answer: %w", e.PID, err)
}

// untimely says why the process of e has no control socket, or ended before it
// answered.
func (e *Entry) untimely() error {
	r, err := readRecord(e.dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return exit.With(exit.NotFound, "%s has been disconnected", e.Device())
	case e.Ended():
		return exit.With(exit.Failure,
			"%s is orphaned: pid %d, which served it, has ended; nbdctl disconnect %[1]s frees it",
			e.Device(), e.PID)
	case err == nil && r.Phase == PhaseConnecting:
		return exit.With(exit.Busy, "%s is being connected by pid %d; try again when it is done", r.Device(), e.PID)
	}
	return exit.With(exit.NotFound, "%s is being disconnected by pid %d", e.Device(), e.PID)
}
