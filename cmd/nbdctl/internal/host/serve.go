package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// IdentifierPrefix begins the kernel's backend identifier of every device that
// nbdctl serves; the device's UUID follows.
const IdentifierPrefix = "nbdctl"

// DefaultBlockSize in bytes. At 4096 the partitions of ordinary images vanish:
// their tables count in sectors of 512.
const DefaultBlockSize = 512

// A Backing is an opened backend with what the serving process must do about it.
type Backing struct {
	Backend backends.Backend
	// Close gives the backend back after the last request.
	Close func() error
	// Discard removes what opening it created, because connecting failed; nil
	// if nothing was.
	Discard func() error
	// Warnings are for the user.
	Warnings []string
}

// A Host serves one device.
type Host struct {
	Store *Store
	Spec  Spec
	// Open opens the backend of a spec.
	Open func(Spec) (*Backing, error)
	// Ready is called once, when the device is usable. If it fails the device
	// is disconnected: nobody would know of it.
	Ready func(Record, []string) error
	// Signals ask the process to end.
	Signals <-chan os.Signal
	// Insist lets a second signal end the process although the device is held.
	Insist bool
	// Tee gets the log too, besides the log file; nil for none.
	Tee io.Writer

	record  Record
	home    *home
	logFile *logFile
	log     *slog.Logger
}

// Serve connects the device and serves it until it is disconnected, by
// whomever, or a signal asks for the end and nobody holds it. When it returns
// the device has gone and so has all that was kept about it. An error before
// Ready means that nothing came to be.
func (h *Host) Serve(ctx context.Context) (err error) {
	identifier := nbdnl.NewIdentifier(IdentifierPrefix)
	h.record = Record{
		Version:    recordVersion,
		UUID:       strings.TrimPrefix(identifier, IdentifierPrefix+":"),
		Identifier: identifier,
		Phase:      PhaseConnecting,
		PID:        os.Getpid(),
		Since:      time.Now().UTC().Truncate(time.Millisecond),
		Spec:       h.Spec,
	}
	starting, started := withSignals(ctx, h.Signals)
	defer started()
	if h.home, err = h.Store.newHome(starting, &h.record); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, h.home.remove()) }()
	if h.logFile, err = openLog(h.record.Log); err != nil {
		return fmt.Errorf("log: %w", err)
	}
	defer h.logFile.Close()
	h.log = newLogger(h.logFile, h.Tee)

	// This netlink socket sends CONNECT and stays open for the life of the
	// device.
	client, err := nbdnl.New()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, client.Close()) }()

	backing, err := h.Open(h.Spec)
	if err != nil {
		return err
	}
	device, err := h.connect(starting, client, backing)
	if err != nil {
		if backing.Discard != nil {
			err = errors.Join(err, backing.Discard())
		}
		return errors.Join(err, backing.Close())
	}
	started() // from here on signals mean something else
	err = h.serve(ctx, device)
	// The image is free for the next user from here on, even if somebody still
	// holds the dead device.
	err = errors.Join(err, backing.Close())
	return errors.Join(err, h.waitFree(ctx, client, device))
}

// connect makes the device and says that it is ready. On error no device is
// left.
func (h *Host) connect(ctx context.Context, client *nbdnl.Client, backing *Backing) (*blockdev.Device, error) {
	options := blockdev.Options{
		Client:      client,
		BlockSize:   h.Spec.BlockSize,
		Connections: h.Spec.Connections,
		Timeout:     h.Spec.Timeout,
		DeadTimeout: h.Spec.DeadTimeout,
		ReadOnly:    h.Spec.ReadOnly,
		Identifier:  h.record.Identifier,
		Logger:      h.log,
	}
	var device *blockdev.Device
	var err error
	if h.Spec.Index != nil {
		device, err = blockdev.ConnectIndex(ctx, *h.Spec.Index, backing.Backend, options)
	} else {
		device, err = blockdev.Connect(ctx, backing.Backend, options)
	}
	if err != nil {
		return nil, err
	}
	index := device.Index()
	h.record.Index = &index
	h.record.Mode = "netlink"
	h.record.Phase = PhaseLive
	h.record.Size = device.Size()
	h.record.BlockSize = device.BlockSize()
	if err := h.publish(ctx, backing.Warnings); err != nil {
		return nil, errors.Join(err, device.Close())
	}
	return device, nil
}

// publish makes the device known: to lists by the record, to whoever waits by
// Ready.
func (h *Host) publish(ctx context.Context, warnings []string) error {
	if err := h.record.write(h.home.dir); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	for _, w := range warnings {
		h.log.Warn(w)
	}
	h.log.Info("connected", "device", h.record.Device(), "size", h.record.Size, "backend", h.Spec.Backend())
	if err := h.Ready(h.record, warnings); err != nil {
		return fmt.Errorf("nobody waits for the device any more: %w", err)
	}
	return nil
}

// serve answers on the control socket and heeds signals until the device has
// gone.
func (h *Host) serve(ctx context.Context, device *blockdev.Device) error {
	ctl, err := listen(filepath.Join(h.home.dir, "ctl"))
	if err != nil {
		return errors.Join(err, device.Close())
	}
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		serveControl(ctl, func() Status { return h.status(device) })
	}()
	defer func() {
		ctl.Close()
		<-answered
	}()

	asked := 0
	for {
		select {
		case <-device.Done():
			return h.gone(device)
		case s := <-h.Signals:
			if asked++; asked > 1 && h.Insist {
				h.log.Warn("asked again: disconnecting although held", "signal", s.String())
				return device.Close()
			}
			// A refusal leaves the device as it is, and so do we: at shutdown
			// processes are killed before their file systems are unmounted.
			if err := device.Disconnect(ctx); err != nil {
				h.log.Warn("goes on serving", "signal", s.String(), "reason", err)
				continue
			}
			return nil
		}
	}
}

// gone is what follows when the device ended by somebody else's doing.
func (h *Host) gone(device *blockdev.Device) error {
	err := device.Err()
	if err == nil {
		h.log.Info("disconnected", "device", h.record.Device())
		return nil
	}
	// The connections are dead but the kernel keeps the device, and every
	// request to it fails. There is no coming back, so it is taken down.
	h.log.Error("connections lost", "device", h.record.Device(), "error", err)
	return errors.Join(fmt.Errorf("%s: %w", h.record.Device(), err), device.Close())
}

// waitFree stays, with the record, until the kernel has let go of the device:
// one that was disconnected while held lives on as a corpse until its last
// holder closes it, and a list should name its owner for so long.
func (h *Host) waitFree(ctx context.Context, client *nbdnl.Client, device *blockdev.Device) error {
	h.record.Phase = PhaseDisconnecting
	if err := h.record.write(h.home.dir); err != nil {
		return err
	}
	ctx, stop := withSignals(ctx, h.Signals)
	defer stop()
	st, err := client.Status(ctx, device.Index())
	if err != nil || st.Identifier != h.record.Identifier {
		return nil // free, or somebody else's already
	}
	if err := client.WaitFree(ctx, device.Index()); err != nil {
		h.log.Warn("gone although the device is still held", "reason", err)
	}
	return nil
}

// status is the answer to the control protocol's "status".
func (h *Host) status(device *blockdev.Device) Status {
	s := Status{Record: h.record, Connections: trafficOf(device.Stats())}
	if e := device.Export().LastError(); e != nil {
		s.LastError = &Failure{Op: e.Op.String(), Offset: e.Offset, Length: e.Length, Error: e.Err.Error(), Time: e.Time}
	}
	return s
}

// listen makes the control socket. Only root may connect.
func listen(path string) (net.Listener, error) {
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("control socket: %w", err), l.Close())
	}
	return l, nil
}

// newLogger logs to the file and, if there is one, to tee.
func newLogger(file, tee io.Writer) *slog.Logger {
	if tee != nil {
		file = io.MultiWriter(file, tee)
	}
	return slog.New(slog.NewTextHandler(file, nil))
}

// withSignals is a context that the next signal ends, with the signal as its
// cause. After the returned function, which may be called again, signals are
// left to others.
func withSignals(ctx context.Context, signals <-chan os.Signal) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	finished := make(chan struct{})
	go func() {
		defer close(finished)
		select {
		case s := <-signals:
			cancel(fmt.Errorf("interrupted by %s", s))
		case <-ctx.Done():
		}
	}()
	return ctx, func() {
		cancel(context.Canceled)
		<-finished
	}
}
