package host

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/parcel"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// passageVersion is that of the passages which this nbdctl writes and reads.
const passageVersion = 1

// A passage is what a serving process tells its successor, beside what package blockdev does. It is
// the note of a blockdev.Document.
type passage struct {
	Version int    `json:"version"`
	Record  Record `json:"record"`
	// Secrets are those of the Spec, as secret.Set sends them.
	Secrets json.RawMessage `json:"secrets,omitempty"`
	// Backend is Handed.State.
	Backend json.RawMessage `json:"backend,omitempty"`
	// Descriptors are what the files are for, in their order.
	Descriptors []string `json:"descriptors"`
}

// The descriptors of a passage.
const (
	passLock    = "lock"    // of the state directory
	passControl = "control" // the control socket
	passBackend = "backend" // one of Handed.Files
	passKeeper  = "keeper"  // the connection to the keeper, if there is one
)

// A Handed backend is on its way to another process. It ends with Resume or Leave.
type Handed struct {
	// State is what the other process has to know of it, as JSON; nil: nothing.
	State json.RawMessage
	// Files are its descriptors.
	Files []*os.File
	// Resume has it used here, as if nothing had been.
	Resume func()
	// Leave gives it up here, in the place of Backing.Close.
	Leave func() error
}

// An Inheritance is what a process has got of a backend from another one.
type Inheritance struct {
	// State and Files are those of Handed. The files belong to whoever gets the Inheritance.
	State json.RawMessage
	Files []*os.File
	// Size and BlockSize are those of the device, or of the export, in bytes.
	Size      int64
	BlockSize int
	// Export tells that it is one for NBD clients, and no device.
	Export bool
}

// Close closes the files, for who has no use for them.
func (i Inheritance) Close() { closeFiles(i.Files) }

// File returns the only file that there is to be. Otherwise all are closed.
func (i Inheritance) File() (*os.File, error) {
	if len(i.Files) != 1 {
		i.Close()
		return nil, fmt.Errorf("%d descriptors of the backend, in place of 1", len(i.Files))
	}
	return i.Files[0], nil
}

// handedOver reports whether another process has the device.
func handedOver(device *blockdev.Device) bool { return errors.Is(device.Err(), blockdev.ErrHandedOver) }

// handOver gives the device to the process at the other end of a Unix socket. If that fails, the
// device is served here, as before.
func (h *Host) handOver(ctx context.Context, device *blockdev.Device, socket *os.File) error {
	switch {
	case socket == nil:
		return exit.Usagef("a handover without a socket")
	case h.Insist:
		return exit.With(exit.Unsupported, "%s is served in the foreground, for whoever has started pid %d: "+
			"a device that is to outlive it is connected without --foreground", h.record.Device(), os.Getpid())
	case h.backing.HandOver == nil:
		return exit.With(exit.Unsupported, "%s: %s can't be handed over", h.record.Device(), h.Spec.Kind)
	}
	changed, err := h.beginChange(ctx)
	if err != nil {
		return err
	}
	defer changed()
	if handedOver(device) {
		return ErrMoved
	}
	nc, err := net.FileConn(socket)
	if err != nil {
		return fmt.Errorf("handover: %w", err)
	}
	defer nc.Close()
	c, ok := nc.(*net.UnixConn)
	if !ok {
		return exit.Usagef("a handover over something that is no Unix socket")
	}
	next, err := hear(ctx, c)
	if err != nil {
		return err
	}
	h.log.Info("handing over", "device", h.record.Device())
	h.freeze()
	err = h.passOver(ctx, device, c)
	if handedOver(device) {
		h.control.leave()
		h.heir.Store(int64(next))
		h.log.Info("handed over", "device", h.record.Device(), "pid", next)
		if err != nil {
			h.log.Warn("the other process has not confirmed that", "reason", err)
		}
		return nil
	}
	h.log.Warn("not handed over, goes on serving", "reason", err)
	_ = os.Remove(filepath.Join(h.state.path, nextRecord)) // It may not have come to be.
	h.thaw()
	return err
}

// A hello is what a successor says when it is ready to take the device over.
type hello struct {
	PID int `json:"pid"`
}

// hear waits for the hello of a successor, while the device is served as ever, and returns its
// number.
func hear(ctx context.Context, c *net.UnixConn) (pid int, err error) {
	stop := context.AfterFunc(ctx, func() { _ = c.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	var said hello
	f, err := parcel.Receive(c, &said)
	if f != nil {
		f.Close()
	}
	switch {
	case ctx.Err() != nil:
		return 0, context.Cause(ctx)
	case err != nil:
		return 0, fmt.Errorf("the new process has not come up: %w", err)
	}
	return said.PID, nil
}

// passOn passes a signal on to the process that has the device now. It must be known to be that.
func (h *Host) passOn(s os.Signal) {
	pid := int(h.heir.Load())
	sig, ok := s.(syscall.Signal)
	if !ok || pid <= 0 {
		return
	}
	if err := signalServing(pid, h.state.path, sig); err == nil { // It may have ended.
		h.log.Info("passed on", "signal", sig.String(), "pid", pid)
	}
}

// passOver does it. What becomes of the backend follows what becomes of the device.
func (h *Host) passOver(ctx context.Context, device *blockdev.Device, c *net.UnixConn) error {
	var handed *Handed
	var copies []*os.File
	err := device.HandOverTo(ctx, c, blockdev.HandOverOptions{
		Unsynced: !h.backing.Synced,
		Still: func() (note json.RawMessage, _ []*os.File, err error) {
			if handed, err = h.backing.HandOver(); err != nil {
				return nil, nil, err
			}
			var files []*os.File
			note, copies, files, err = h.passage(handed)
			return note, append(copies[:len(copies):len(copies)], files...), err
		},
	})
	closeFiles(copies)
	switch {
	case handed == nil:
	case handedOver(device):
		if left := handed.Leave(); left != nil {
			h.log.Warn("the backend was not left in order", "reason", left)
		}
	default:
		handed.Resume()
	}
	return err
}

// passage returns what the successor has to know, and the descriptors: copies that are to be
// closed, and others, behind them.
func (h *Host) passage(handed *Handed) (note json.RawMessage, copies, files []*os.File, err error) {
	h.mu.Lock()
	p := passage{Version: passageVersion, Record: h.record, Backend: handed.State}
	h.mu.Unlock()
	if len(h.Spec.Secrets) != 0 {
		var b bytes.Buffer
		if err := h.Spec.Secrets.Send(&b); err != nil {
			return nil, nil, nil, err
		}
		p.Secrets = b.Bytes()
	}
	control, err := h.control.file()
	if err != nil {
		return nil, nil, nil, err
	}
	p.Descriptors, copies = []string{passControl}, []*os.File{control}
	if k := h.keeper(); k != nil {
		keeper, err := k.conn.File()
		if err != nil {
			return nil, copies, nil, fmt.Errorf("keeper: %w", err)
		}
		p.Descriptors, copies = append(p.Descriptors, passKeeper), append(copies, keeper)
	}
	p.Descriptors = append(p.Descriptors, passLock)
	for range handed.Files {
		p.Descriptors = append(p.Descriptors, passBackend)
	}
	note, err = json.Marshal(p)
	return note, copies, append([]*os.File{h.state.lock}, handed.Files...), err
}

// freeze keeps the record as lists have it, for another process may write it.
func (h *Host) freeze() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.frozen = true
}

// isFrozen reports whether the device is being handed over, or has been.
func (h *Host) isFrozen() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.frozen
}

// thaw has the record written again, with all that has changed.
func (h *Host) thaw() {
	h.mu.Lock()
	h.frozen = false
	h.mu.Unlock()
	if err := h.update(func(*Record) {}); err != nil {
		h.log.Warn("a change could not be noted", "reason", err)
	}
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
