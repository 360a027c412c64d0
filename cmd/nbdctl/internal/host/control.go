package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"time"
)

// The control protocol: one JSON request and one JSON response per connection
// to the Unix socket ctl. Both carry the version; a process answers what it
// knows of an older or newer asker's request and says "unknown operation" to
// the rest, so that every nbdctl can query the devices of every other.
const (
	controlVersion = 1
	controlLimit   = 1 << 20 // bytes of one message
	controlTimeout = 5 * time.Second
)

type request struct {
	Version int    `json:"version"`
	Op      string `json:"op"`
}

type response struct {
	Version int     `json:"version"`
	Error   string  `json:"error,omitempty"`
	Status  *Status `json:"status,omitempty"`
}

// A Status is what a serving process tells of itself beyond its record.
type Status struct {
	Record Record `json:"record"`
	// Connections has the counters of each connection to the kernel.
	Connections []Traffic `json:"connections"`
	// LastError is the newest request that failed, nil if none did.
	LastError *Failure `json:"last_error"`
}

// A Failure is a request that the backend could not serve. The kernel turns
// every such error into EIO: this is where the true one can be read.
type Failure struct {
	Op     string    `json:"op"`
	Offset uint64    `json:"offset"` // bytes
	Length uint32    `json:"length"` // bytes
	Error  string    `json:"error"`
	Time   time.Time `json:"time"`
}

// controlAskers bounds how many are answered at a time.
const controlAskers = 8

// A control is the control socket of a serving process.
type control struct {
	listener net.Listener
	status   func() Status
	slots    chan struct{} // holds one element for each connection
	ended    chan struct{} // closed when nothing is accepted any more
}

// listenControl makes the control socket at path and answers on it. Only root
// may connect.
func listenControl(path string, status func() Status) (*control, error) {
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("control socket: %w", err), l.Close())
	}
	c := &control{listener: l, status: status, slots: make(chan struct{}, controlAskers), ended: make(chan struct{})}
	go c.serve()
	return c, nil
}

func (c *control) serve() {
	defer close(c.ended)
	for {
		c.slots <- struct{}{} // free again within controlTimeout
		conn, err := c.listener.Accept()
		if errors.Is(err, net.ErrClosed) {
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
			answer(conn, c.status)
			conn.Close()
		}()
	}
}

// close ends the answering of new connections.
func (c *control) close() {
	c.listener.Close()
	<-c.ended
}

// answer serves one connection. A peer that says nothing, or nonsense, gets
// nothing.
func answer(c net.Conn, status func() Status) {
	if err := c.SetDeadline(time.Now().Add(controlTimeout)); err != nil {
		return
	}
	var req request
	if err := json.NewDecoder(io.LimitReader(c, controlLimit)).Decode(&req); err != nil {
		return
	}
	resp := response{Version: controlVersion}
	switch req.Op {
	case "status":
		s := status()
		resp.Status = &s
	default:
		resp.Error = fmt.Sprintf("unknown operation %q", req.Op)
	}
	// The asker may have gone; there is nobody else to tell.
	_ = json.NewEncoder(c).Encode(resp)
}

// Status asks the process of e about itself. It needs to be root.
func (e *Entry) Status(ctx context.Context) (*Status, error) {
	ctx, cancel := context.WithTimeout(ctx, controlTimeout)
	defer cancel()
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", filepath.Join(e.dir, "ctl"))
	if err != nil {
		return nil, fmt.Errorf("asking pid %d: %w", e.PID, err)
	}
	defer c.Close()
	deadline, _ := ctx.Deadline()
	if err := c.SetDeadline(deadline); err != nil {
		return nil, err
	}
	if err := json.NewEncoder(c).Encode(request{controlVersion, "status"}); err != nil {
		return nil, fmt.Errorf("asking pid %d: %w", e.PID, err)
	}
	var resp response
	if err := json.NewDecoder(io.LimitReader(c, controlLimit)).Decode(&resp); err != nil {
		return nil, fmt.Errorf("asking pid %d: %w", e.PID, err)
	}
	if resp.Error != "" {
		return nil, fmt.Errorf("pid %d answers: %w", e.PID, errors.New(resp.Error))
	}
	if resp.Status == nil {
		return nil, fmt.Errorf("pid %d answers nothing", e.PID)
	}
	return resp.Status, nil
}
