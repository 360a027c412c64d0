package host

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/secret"
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
	// Backend is nil if the kernel speaks with a server elsewhere (Remote).
	Backend backends.Backend
	// Close gives the backend back after the last request.
	Close func() error
	// Discard removes what opening it created, because connecting failed; nil
	// if nothing was.
	Discard func() error
	// Warnings are for the user.
	Warnings []string
	// Remote is what is known of a backend elsewhere; nil: it is on this machine.
	Remote *Remote
	// HandOver gets it ready for another process to go on with it. No request is made meanwhile.
	HandOver func() (*Handed, error)
	// Synced has what was written synced before it is handed over.
	Synced bool
	// Keep returns that by which another process can go on with the backend after this one has
	// died, with copies of its files; nil: it opens the backend anew. It may be called while
	// requests are made.
	Keep func() (Kept, error)
	// Missed tells of writes that were lost before, of which nobody else tells: another process has
	// died with the word for it. It is called once, while requests are made, and may take long;
	// nil: there was no other process.
	Missed func() error
	// Identity tells the backing object from all others, whatever its name is; "": nothing does.
	Identity string
}

// A Kept is what outlives a process of its backend.
type Kept struct {
	// State and Files are as those of Handed.
	State json.RawMessage
	Files []*os.File
}

// A Host serves one device.
type Host struct {
	Store *Store
	Spec  Spec
	// Open opens the backend of a spec. Its context ends with a signal.
	Open func(context.Context, Spec) (*Backing, error)
	// Inherit goes on with the backend of a spec that another process has handed over.
	Inherit func(context.Context, Spec, Inheritance) (*Backing, error)
	// Ready is called once, when the device is usable, with warnings for the
	// user; its context ends with a signal. If it fails everything is undone:
	// nobody would know of the device. After TakeOver nothing can be undone.
	Ready func(context.Context, Record, []string) error
	// Signals ask the process to end.
	Signals <-chan os.Signal
	// Insist lets a second Ctrl-C soon after a first end the process although
	// the device is held.
	Insist bool
	// Tee gets the log too, besides the log file; nil for none.
	Tee io.Writer

	mu      sync.Mutex // guards record once the device is connected
	record  Record
	state   *stateDir
	control *control
	backing *Backing
	remote  *Remote
	logFile *logFile
	log     *slog.Logger
	// redactor keeps the secrets of the spec out of what others are told.
	redactor *secret.Redactor
	// changing holds a value while the device is being changed.
	changing chan struct{}
	// frozen keeps the record as lists have it; guarded by mu.
	frozen bool
	// asked is the signal that the device is being ended for; nil: none. It is for serve and goOn.
	asked os.Signal
	// heir is the number of the process that has the device now; 0: this one has.
	heir atomic.Int64
	// keeping is the keeper of the device; nil: there is none. mu guards it. keepers counts those
	// that have died.
	keeping *keeping
	keepers budget
	// inherited and keeperConn are what the keeper has that has started this process, and the
	// connection to it; nil: none has.
	inherited  *estate
	keeperConn *net.UnixConn
	// heard tells of the error of TakeOver that the other process knows more of it.
	heard bool
}

// Serve connects the device and serves it until somebody disconnects it, or a
// signal asks for the end and nobody holds it. When Serve returns, the device
// has gone, and so has all that was kept about it. An error before Ready means
// that nothing came to be.
func (h *Host) Serve(ctx context.Context) (err error) {
	h.redactor = h.Spec.Secrets.Redactor()
	defer func() { err = h.redactor.Error(err) }()
	identifier := nbdnl.NewIdentifier(IdentifierPrefix)
	h.record = Record{
		Version:    recordVersion,
		UUID:       strings.TrimPrefix(identifier, IdentifierPrefix+":"),
		Identifier: identifier,
		Phase:      PhaseConnecting,
		PID:        os.Getpid(),
		Since:      time.Now().UTC().Truncate(time.Millisecond),
		Spec:       h.Spec,
		Passage:    passageVersion,
	}
	starting, started := withSignals(ctx, h.Signals)
	defer started()
	if h.state, err = h.Store.newStateDir(starting, &h.record); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, h.state.end()) }()
	if err := h.openLog(h.logMode()); err != nil {
		return err
	}
	defer h.logFile.Close()

	// Its netlink socket sends CONNECT and stays open until the device is gone,
	// or its thread keeps the device connected.
	client, err := h.Spec.system(h.Store).NewClient()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, client.Close()) }()

	if err := client.Probe(starting); err != nil {
		return err
	}
	h.decide(client.Mode())
	spec := h.Spec
	spec.Ioctl = client.Mode() == nbdnl.ModeIoctl // also where nothing else is to be had
	if h.backing, err = h.Open(starting, spec); err != nil {
		return err
	}
	device, err := h.connect(starting, client, h.backing)
	if err != nil {
		undo := h.backing.Close
		if h.backing.Discard != nil {
			undo = h.backing.Discard
		}
		return errors.Join(err, undo())
	}
	// A signal that came after the last look at starting is the first that the
	// device gets.
	return h.goOn(ctx, client, device, started())
}

// goOn serves the device to its end here. first is a signal that came already, or nil.
func (h *Host) goOn(ctx context.Context, client *nbdnl.Client, device *blockdev.Device, first os.Signal) error {
	h.tellMissed(device)
	err := h.serve(ctx, device, first)
	// A backend that never returns keeps the process, and what the process locks,
	// for as long. Closed during a call, the backend could do harm.
	<-device.Done()
	if handedOver(device) {
		h.keeper().leave()
		h.control.drain() // What has asked for the handover leaves the backend at last.
		h.state.leave()
		// What was meant for the device is for the next process.
		for _, s := range append(pending(h.Signals), h.asked) {
			h.passOn(s)
		}
		return nil
	}
	if loss := device.Loss(); loss != nil {
		h.log.Error("writes were lost", "device", h.record.Device(), "error", loss)
		if !errors.As(err, new(*blockdev.LossError)) { // The end of the device may have told it.
			err = errors.Join(err, loss)
		}
	}
	// The image is free for the next user from here on, even if somebody still
	// holds the dead device.
	err = errors.Join(err, h.keeper().release(), h.backing.Close())
	return errors.Join(err, h.waitFree(ctx, client, device))
}

// connect makes the device and says that it is ready. On error no device is
// left.
func (h *Host) connect(ctx context.Context, client *nbdnl.Client, backing *Backing) (*blockdev.Device, error) {
	h.remote = backing.Remote
	device, err := h.make(ctx, backing.Backend, h.options(client))
	if err != nil {
		return nil, err
	}
	if err := h.publish(ctx, device, backing); err != nil {
		return nil, errors.Join(err, device.Close())
	}
	return device, nil
}

// options are those of the device, as the spec has them.
func (h *Host) options(client *nbdnl.Client) blockdev.Options {
	return blockdev.Options{
		Client:      client,
		BlockSize:   h.Spec.BlockSize,
		Connections: h.Spec.Connections,
		Timeout:     h.remote.timeout(h.Spec.Timeout),
		DeadTimeout: h.Spec.DeadTimeout,
		ReadOnly:    h.Spec.ReadOnly,
		Recoverable: h.Spec.Restart > 0,
		Identifier:  h.record.Identifier,
		Logger:      h.log,
	}
}

// make has the kernel connect the device.
func (h *Host) make(ctx context.Context, b backends.Backend, o blockdev.Options) (*blockdev.Device, error) {
	index := h.Spec.Index
	switch {
	case h.remote.direct() && index != nil:
		return blockdev.ConnectRemoteIndex(ctx, *index, h.remote.Export, o)
	case h.remote.direct():
		return blockdev.ConnectRemote(ctx, h.remote.Export, o)
	case index != nil:
		return blockdev.ConnectIndex(ctx, *index, b, o)
	}
	return blockdev.Connect(ctx, b, o)
}

// insistence is how soon a second Ctrl-C must follow the first to count.
const insistence = 10 * time.Second

// serve heeds signals until the device has gone. first is a signal that came
// already, or nil.
func (h *Host) serve(ctx context.Context, device *blockdev.Device, first os.Signal) error {
	defer func() {
		if handedOver(device) {
			h.control.close(ErrMoved)
		} else {
			h.control.close(errEnding)
		}
	}()
	// A signal asks for an orderly end. It may take as long as it takes to write
	// what is cached, so there is at most one at a time.
	ctx, cancel := context.WithCancel(ctx)
	var keeping sync.WaitGroup
	ended := make(chan error, 1)
	asked := false
	ask := func(s os.Signal) {
		asked, h.asked = true, s
		h.log.Info("asked to end", "signal", s.String())
		go func() { ended <- device.Disconnect(ctx) }()
	}
	defer func() {
		cancel()
		keeping.Wait()
		if asked {
			<-ended
		}
	}()
	if first != nil {
		ask(first)
	}
	var refused time.Time
	for {
		select {
		case err := <-ended:
			asked = false
			if err == nil {
				return nil
			}
			if isDone(device) { // Whatever could not be written, the device has gone.
				gone := h.gone(device)
				if errors.Is(gone, err) { // The end of a device says the same each time.
					return gone
				}
				return errors.Join(err, gone)
			}
			// A refusal leaves the device as it is, and so do we: at shutdown
			// processes are killed before their file systems are unmounted.
			refused, h.asked = time.Now(), nil
			h.log.Warn("goes on serving", "reason", err)
		case <-device.Changes():
			if err := h.note(device); err != nil {
				h.log.Warn("a change could not be noted", "reason", err)
			}
			if device.State() == nbdnl.StateOrphaned && !h.isFrozen() {
				// Done comes only when the backend lets go of what it has.
				return h.lost(device, errDead)
			}
			if k := h.keeper(); k != nil && !k.hasAll(device) {
				keeping.Go(func() { h.keepUp(ctx, device) })
			}
		case <-h.remote.changed():
			h.noteRemote(device)
		case <-device.Done():
			return h.gone(device)
		case <-h.keeper().ended():
			h.keeper().leave()
			h.setKeeper(nil)
			keeping.Go(func() { h.keepAgain(ctx, device) })
		case s := <-h.Signals:
			if h.Insist && s == os.Interrupt && (asked || time.Since(refused) < insistence) {
				h.log.Warn("asked again: disconnecting although held")
				cancel() // Close waits for its turn
				return device.Close()
			}
			if !asked {
				ask(s)
			}
		}
	}
}
