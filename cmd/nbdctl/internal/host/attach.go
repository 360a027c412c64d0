package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// DefaultDeadTimeout is how long requests wait for a device to be served again whose process has
// died, unless connect was told.
const DefaultDeadTimeout = time.Minute

// Attach is Serve for a device whose process has died, and left r. The backend is the one that the
// spec of r names, opened anew. It must be the one that the device had: what the kernel and the
// record know of it is compared. If a keeper has started this process, what that has is in the
// place of what would be opened. An error before Ready means that the device still waits; so does
// the end of starting before.
func (h *Host) Attach(ctx, starting context.Context, r Record) (err error) {
	h.Spec, h.record = r.Spec, r
	h.redactor = h.Spec.Secrets.Redactor()
	defer func() { err = h.redactor.Error(err) }()
	starting, started := withSignals(starting, h.Signals)
	defer started()
	state, err := h.inheritDir()
	if err != nil {
		return err
	}
	defer func() {
		if h.state == nil {
			state.lock.Close()
		}
	}()
	if err := h.openLog(h.logMode()); err != nil {
		return err
	}
	defer h.logFile.Close()
	client, err := h.Spec.system(h.Store).NewClient()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, client.Close()) }()
	// Whoever connects before the device is served is answered when it is.
	listener, publish, err := h.controlOf(state)
	if err != nil {
		return err
	}
	before := h.record.PID
	device, err := h.attach(starting, client)
	if err != nil {
		listener.Close()
		h.log.Warn("not attached", "reason", err)
		return err
	}
	// There is no way back from here on.
	h.state = state
	defer func() { err = errors.Join(err, h.state.end()) }()
	h.answerOn(listener, device)
	if err := publish(); err != nil {
		h.log.Error("nobody can ask it", "error", err)
	}
	if err := h.update(func(r *Record) {
		r.PID, r.Passage, r.GaveUp = os.Getpid(), passageVersion, nil
	}); err != nil {
		h.log.Warn("lists show the process that was before", "reason", err)
	}
	if err := h.note(device); err != nil {
		h.log.Warn("a change could not be noted", "reason", err)
	}
	if h.keeperConn == nil {
		h.unkept(h.keep(device))
	}
	h.log.Info("attached", "device", h.record.Device(), "after", before, "backend", h.Spec.Backend())
	if err := h.Ready(ctx, h.status(device).Record, h.redactor.Texts(h.backing.Warnings)); err != nil {
		h.log.Warn("who has asked for that does not wait any more", "reason", err)
	}
	if h.keeperConn != nil { // The keeper heeds this process from here on.
		h.unkept(h.keepBy(h.keeperConn, device))
	}
	return h.goOn(ctx, client, device, started())
}

// inheritDir takes the directory of a process that has died, with the record that is there now, and
// locks it.
func (h *Host) inheritDir() (*stateDir, error) {
	state := &stateDir{path: filepath.Join(h.Store.dir, h.record.UUID)}
	var err error
	state.lock, err = lockTry(filepath.Join(state.path, "lock"))
	switch {
	case errors.Is(err, errLocked):
		return nil, exit.With(exit.Busy, "%s has a process that serves it: see nbdctl status %[1]s", h.record.Device())
	case errors.Is(err, fs.ErrNotExist):
		return nil, exit.With(exit.NotFound, "%s is not connected any more", h.record.Device())
	case err != nil:
		return nil, fmt.Errorf("state directory: %w", err)
	}
	r, err := readRecord(state.path)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("state directory: %w", err), state.lock.Close())
	}
	h.record = *r
	h.record.Spec = h.Spec
	return state, nil
}

// attach opens the backend and has the kernel speak with this process. After an error the device
// waits, and the backend is as it was.
func (h *Host) attach(ctx context.Context, client *nbdnl.Client) (_ *blockdev.Device, err error) {
	left, err := h.left(ctx, client)
	if err != nil {
		return nil, err
	}
	// The object is taken as it is, and compared with the device as that is now.
	spec := h.Spec
	spec.Create, spec.Size, spec.BlockSize = false, 0, h.record.BlockSize
	if h.backing, err = h.reopen(ctx, spec, left); err != nil {
		return nil, err
	}
	defer func() {
		// What the keeper has is not to be closed, which would give memory back: this process ends.
		if err != nil && h.inherited == nil {
			err = errors.Join(err, h.backing.Close())
		}
	}()
	if was := h.record.Identity; was != "" && h.backing.Identity != was {
		return nil, fmt.Errorf("%s is another object than %s had: %s in place of %s; attach the one that it had",
			h.Spec.Backend(), h.record.Device(), h.backing.Identity, was)
	}
	h.remote = h.backing.Remote
	if was := h.record.Remote; was != nil && h.remote != nil && h.remote.way() != was.Way {
		return nil, exit.With(exit.Unsupported, "%s was connected by way=%s, and %s would be by way=%s: "+
			"use -o way=%[2]s", h.record.Device(), was.Way, h.Spec.Backend(), h.remote.way())
	}
	if h.Spec.DeadTimeout <= 0 {
		h.Spec.DeadTimeout = DefaultDeadTimeout
	}
	device, err := h.goOnWith(ctx, left, h.options(client))
	if err != nil {
		return nil, explainMismatch(err)
	}
	return device, nil
}

// goOnWith has the device served here, over the connections that the keeper has as far as those
// stood still, or watched, if the kernel speaks with a server elsewhere.
func (h *Host) goOnWith(ctx context.Context, left nbdnl.Status, o blockdev.Options) (*blockdev.Device, error) {
	switch {
	case h.inherited != nil:
	case h.remote.direct():
		return blockdev.AttachRemote(ctx, left, h.remote.Export, o)
	default:
		return blockdev.Attach(ctx, left, h.backing.Backend, o)
	}
	files := h.inherited.of(passDevice)
	defer closeFiles(files)
	doc := h.inherited.Device
	// These may have changed since the keeper has it.
	doc.Size, doc.Timeout, doc.DeadTimeout, o.DeadTimeout = left.Size, o.Timeout, o.DeadTimeout, 0
	var device *blockdev.Device
	var err error
	if h.remote.direct() {
		device, err = blockdev.RecoverRemote(ctx, doc, files, h.remote.Export, o)
	} else {
		device, err = blockdev.Recover(ctx, doc, files, h.backing.Backend, o)
	}
	if err != nil {
		return nil, err
	}
	kept, replaced := device.Recovered()
	h.log.Info("recovered", "connections", kept+replaced, "undisturbed", kept)
	if replaced == 0 {
		h.record.Undisturbed++
	}
	h.record.Restarts++
	return device, nil
}

// left is what the kernel shows of the device, which must be the one of the record.
func (h *Host) left(ctx context.Context, client *nbdnl.Client) (st nbdnl.Status, err error) {
	if h.record.Index != nil {
		st, err = client.Status(ctx, *h.record.Index)
	}
	switch {
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return st, err
	case err != nil, h.record.Index == nil, !st.Connected(),
		st.HasIdentifier && st.Identifier != h.record.Identifier:
		return st, exit.With(exit.NotFound, "%s is not connected any more", h.record.Device())
	}
	return st, nil
}

// explainMismatch says what can be done about a backend that is not the one of the device.
func explainMismatch(err error) error {
	var differs *blockdev.MismatchError
	if !errors.As(err, &differs) {
		return err
	}
	if differs.Setting == "state" {
		return exit.With(exit.NotFound, "%s is not connected any more", nbdnl.Path(differs.Index))
	}
	return fmt.Errorf("it is not what the device had: %w; the device waits for the one that it had", err)
}

// reopen opens the backend of the spec, unless the keeper has it.
func (h *Host) reopen(ctx context.Context, spec Spec, left nbdnl.Status) (*Backing, error) {
	e := h.inherited
	if e == nil || len(e.of(passBackend)) == 0 && e.Backend == nil {
		return h.Open(ctx, spec)
	}
	return h.Inherit(ctx, spec, Inheritance{
		State: e.Backend, Files: e.of(passBackend), Size: left.Size, BlockSize: left.BlockSize,
	})
}

// controlOf is the control socket for the device of a process that has died: the one that the
// keeper has, or a new one, for which publish has to be called.
func (h *Host) controlOf(state *stateDir) (l net.Listener, publish func() error, err error) {
	if h.inherited == nil {
		return prepareControl(state.path)
	}
	files := h.inherited.of(passControl)
	defer closeFiles(files)
	if len(files) != 1 {
		return nil, nil, fmt.Errorf("the keeper has %d control sockets", len(files))
	}
	if l, err = net.FileListener(files[0]); err != nil {
		return nil, nil, fmt.Errorf("control socket: %w", err)
	}
	return l, func() error { return nil }, nil
}
