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
	"path/filepath"
	"time"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/parcel"
	"github.com/nbdctl/nbdctl/server"
)

// The control protocol has one JSON request and one JSON response per connection
// to the Unix socket ctl. Both carry the version. A process answers what it knows
// of an older or newer asker's request, and says "unknown operation" to the rest.
// So every nbdctl can query the devices of every other.
const (
	controlVersion = 1
	controlLimit   = 1 << 20 // bytes of one message
	controlTimeout = 5 * time.Second
	// actionTimeout bounds what changes the device: the kernel may make it
	// wait for the requests in flight.
	actionTimeout = time.Minute
)

// The operations.
const (
	opStatus = "status"
	opStats  = "stats"
	opChange = "change"
	opKick   = "kick"
	opLoss   = "loss"
	// opHandOver comes with a descriptor, over which the device passes to another process.
	opHandOver = "handover"
)

type request struct {
	Version int     `json:"version"`
	Op      string  `json:"op"`
	Change  *Change `json:"change,omitempty"`
	// File came along, or goes.
	File *os.File `json:"-"`
}

type response struct {
	Version int       `json:"version"`
	Error   string    `json:"error,omitempty"`
	Code    exit.Code `json:"code,omitempty"`
	// Moved says that another process has the device now, which answers at the same address.
	Moved  bool    `json:"moved,omitempty"`
	Status *Status `json:"status,omitempty"`
}

// A Status is what a serving process tells of itself beyond its record.
type Status struct {
	Record Record `json:"record"`
	// Connections has the counters of each connection to the kernel.
	Connections []Traffic `json:"connections"`
	// LastError is the newest request that failed, nil if none did.
	LastError *Failure `json:"last_error"`
	// Loss is what the process was asked to tell of writes that were lost since the connect.
	Loss string `json:"loss,omitempty"`
	// Stats are the full counts of each connection, for those who ask for them.
	Stats []server.Stats `json:"stats,omitempty"`
	// Exports are those of a process that serves no device, which has nothing of the above.
	Exports []ExportStatus `json:"exports,omitempty"`
}

// A Failure is a request that the backend could not serve. The kernel turns
// every such error into EIO: this is where the true one can be read.
type Failure struct {
	Op     string    `json:"op"`
	Offset uint64    `json:"offset"` // bytes
	Length uint64    `json:"length"` // bytes
	Error  string    `json:"error"`
	Time   time.Time `json:"time"`
}

// controlAskers bounds how many are answered at a time.
const controlAskers = 8

// A service does what a request asks for.
type service func(context.Context, request) (*Status, error)

// errUnknownOp is the service's answer to what it has never heard of.
var errUnknownOp = errors.New("unknown operation")

// errEnding is the answer to what was not done before the end of the device.
var errEnding = exit.With(exit.NotFound, "the device is being disconnected")

// ErrMoved is the answer to what came too late: who asks again is answered by the next process.
var ErrMoved = exit.With(exit.Busy, "another process has taken the device over in this moment; try again")

// A control is the control socket of a serving process.
type control struct {
	listener net.Listener
	serve    service
	slots    chan struct{} // holds one element for each connection
	ended    chan struct{} // closed when nothing is accepted any more
	ctx      context.Context
	cancel   context.CancelCauseFunc // ends what is being served
}

// listenControl makes the control socket at path, which goes with its directory. Only root may
// connect.
func listenControl(path string) (*net.UnixListener, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	l.SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("control socket: %w", err), l.Close())
	}
	return l, nil
}

// prepareControl makes a control socket that is to take the place of one which a process has left
// in dir. publish does that, in one step.
func prepareControl(dir string) (l *net.UnixListener, publish func() error, err error) {
	prepared := filepath.Join(dir, "new") // as long as the name that it gets
	if err := os.Remove(prepared); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("control socket: %w", err)
	}
	if l, err = listenControl(prepared); err != nil {
		return nil, nil, err
	}
	return l, func() error { return os.Rename(prepared, filepath.Join(dir, "ctl")) }, nil
}

// file returns a copy of the descriptor of the listener.
func (c *control) file() (*os.File, error) {
	f, err := c.listener.(interface{ File() (*os.File, error) }).File()
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	return f, nil
}

// newControl answers on l.
func newControl(l net.Listener, serve service) *control {
	c := &control{
		listener: l,
		serve:    serve,
		slots:    make(chan struct{}, controlAskers),
		ended:    make(chan struct{}),
	}
	c.ctx, c.cancel = context.WithCancelCause(context.Background())
	go c.run()
	return c
}

func (c *control) run() {
	defer close(c.ended)
	for {
		c.slots <- struct{}{} // free again within actionTimeout
		conn, err := c.listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			<-c.slots
			return
		}
		if err != nil {
			// Out of descriptors, or the like: it passes.
			<-time.After(time.Second)
			<-c.slots
			continue
		}
		go func() {
			defer func() { <-c.slots }()
			answer(c.ctx, conn, c.serve)
			conn.Close()
		}()
	}
}

// close ends the answering of new connections, and what is being done for the
// others, for that reason.
func (c *control) close(why error) {
	c.cancel(why)
	c.leave()
}

// leave ends the answering of new connections.
func (c *control) leave() {
	c.listener.Close()
	<-c.ended
}

// drain waits, after close, until all connections were answered. One that asks nothing is waited
// for, too, within controlTimeout.
func (c *control) drain() {
	for range cap(c.slots) {
		c.slots <- struct{}{}
	}
}

// answer serves one connection. A peer that says nothing, or nonsense, gets
// nothing.
func answer(ctx context.Context, c net.Conn, serve service) {
	if err := c.SetDeadline(time.Now().Add(controlTimeout)); err != nil {
		return
	}
	var asked json.RawMessage
	in := &parcel.Reader{From: c}
	err := json.NewDecoder(io.LimitReader(in, controlLimit)).Decode(&asked)
	defer in.Close()
	if err != nil {
		return
	}
	req := request{File: in.File}
	if err := json.Unmarshal(asked, &req); err != nil {
		version := versionOf(asked)
		if version <= controlVersion {
			return
		}
		serve = func(context.Context, request) (*Status, error) {
			return nil, exit.With(exit.Unsupported,
				"asked in version %d of the control protocol, of which pid %d knows up to %d: %w",
				version, os.Getpid(), controlVersion, err)
		}
	}
	// What nobody waits for any more is not done. The request can be old: a
	// process that was stopped reads it when it goes on. Its asker was told that
	// there was no answer.
	if hungUp(c) || c.SetDeadline(time.Time{}) != nil {
		return
	}
	process := ctx
	ctx, cancel := context.WithTimeoutCause(ctx, actionTimeout, fmt.Errorf("not done within %s", actionTimeout))
	defer cancel()
	go func() {
		_, _ = c.Read(make([]byte, 1)) // until the asker goes, or c is closed
		cancel()
	}()
	status, err := serve(ctx, req)
	if err != nil && process.Err() != nil {
		err = context.Cause(process)
	}
	resp := response{Version: controlVersion, Status: status}
	if err != nil {
		resp.Error, resp.Code, resp.Moved = err.Error(), exit.Of(err), errors.Is(err, ErrMoved)
	}
	if c.SetDeadline(time.Now().Add(controlTimeout)) == nil {
		_ = json.NewEncoder(c).Encode(resp) // The asker may have gone.
	}
}
