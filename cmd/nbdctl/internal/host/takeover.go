package host

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/parcel"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/secret"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// TakeOver is Serve for a device that the process at the other end of c hands over, whose record is
// r. An error before Ready means that the device is that process's still, as if nothing had been;
// so does the end of starting before.
func (h *Host) TakeOver(ctx, starting context.Context, c *net.UnixConn, r Record) (err error) {
	h.Spec, h.record = r.Spec, r
	starting, started := withSignals(starting, h.Signals)
	defer started()
	err = h.openLog(0o600) // for root alone, should it not be there any more
	switch {
	case errors.Is(err, fs.ErrNotExist): // Its directory goes with the device.
		return exit.With(exit.NotFound, "%s is not connected any more", r.Device())
	case err != nil:
		return err
	}
	defer h.logFile.Close()
	client, err := h.Spec.system(h.Store).NewClient()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, client.Close()) }()
	s := &succession{host: h}
	defer s.close()
	// All that can be done before is done: the device does not stand still yet.
	if err := parcel.Send(c, hello{PID: os.Getpid()}, nil); err != nil {
		h.heard = true
		return fmt.Errorf("the other process has gone: %w", err)
	}
	o := blockdev.Options{Client: client, Logger: h.log, Recoverable: r.Spec.Restart > 0}
	device, err := blockdev.TakeOverEither(starting, c, s.open, s.openRemote, o)
	c.Close()
	if err != nil {
		return h.redactor.Error(h.untaken(err, s.refused != nil))
	}
	// There is no way back from here on.
	h.state, h.backing, h.remote = s.state, s.backing, s.backing.Remote
	defer func() { err = errors.Join(err, h.state.end()) }()
	if err := s.publish(); err != nil {
		h.log.Warn("lists show the process that was before", "reason", err)
	}
	if err := h.note(device); err != nil {
		h.log.Warn("a change could not be noted", "reason", err)
	}
	h.answerOn(s.control, device)
	s.control = nil
	s.keepOn(device)
	h.log.Info("taken over", "device", h.record.Device(), "from", r.PID)
	if err := h.Ready(ctx, h.status(device).Record, h.redactor.Texts(h.backing.Warnings)); err != nil {
		h.log.Warn("who has asked for that does not wait any more", "reason", err)
	}
	return h.goOn(ctx, client, device, started())
}

// untaken says why the device was not taken over, and whether that was found out here.
func (h *Host) untaken(err error, here bool) error {
	var differs *blockdev.MismatchError
	switch {
	case errors.As(err, &differs):
		here = true
		if differs.Setting != "state" {
			break
		}
		fallthrough
	case !here && (errors.Is(err, nbdnl.ErrNotConnected) || errors.Is(err, nbdnl.ErrNotOwner)):
		here = true // It has ended since it was compared, and another may have its index.
		err = exit.With(exit.NotFound, "%s is not connected any more", h.record.Device())
	}
	h.heard = !here
	return err
}

// nextRecord is the file with the record of a process that takes over, until it has.
const nextRecord = ".next.json"

// A succession is what a process gets from the one that serves a device before it.
type succession struct {
	host    *Host
	state   *stateDir
	control net.Listener
	backing *Backing
	keeper  *net.UnixConn // the connection to that of the other process; nil: it has none
	publish func() error  // has lists show the record of this process
	refused error         // why it does not take that
}

// open is a blockdev.Opener. It does all that can fail.
func (s *succession) open(ctx context.Context, doc *blockdev.Document, files []*os.File) (backends.Backend, error) {
	if s.refused = s.inherit(ctx, doc, files); s.refused != nil {
		return nil, s.refused
	}
	return s.backing.Backend, nil
}

// openRemote is open for a device that the kernel has connected to a server elsewhere.
func (s *succession) openRemote(
	ctx context.Context, doc *blockdev.Document, files []*os.File,
) (blockdev.Remote, error) {
	s.refused = s.inherit(ctx, doc, files)
	if s.refused == nil && !s.backing.Remote.direct() {
		s.refused = fmt.Errorf("%s is not what the kernel could be connected to", s.host.Spec.Backend())
	}
	if s.refused != nil {
		return nil, s.refused
	}
	return s.backing.Remote.Export, nil
}

func (s *succession) inherit(ctx context.Context, doc *blockdev.Document, files []*os.File) error {
	h := s.host
	var p passage
	if version := versionOf(doc.Note); version != passageVersion {
		closeFiles(files)
		return unknownPassage(version)
	}
	if err := json.Unmarshal(doc.Note, &p); err != nil {
		closeFiles(files)
		return fmt.Errorf("what the other process tells is not understood: %w", err)
	}
	of, err := sorted(p.Descriptors, files)
	if err != nil {
		closeFiles(files)
		return err
	}
	// The backend's are given to Inherit.
	defer closeFiles(of[passControl])
	defer closeFiles(of[passKeeper])
	if err := s.inheritState(&p, of); err != nil {
		closeFiles(of[passBackend])
		return err
	}
	s.backing, err = h.Inherit(ctx, h.Spec, Inheritance{
		State: p.Backend, Files: of[passBackend], Size: doc.Size, BlockSize: doc.BlockSize,
	})
	return err
}

// unknownPassage refuses what another version of nbdctl tells.
func unknownPassage(version int) error {
	return exit.With(exit.Unsupported, "the device is handed over in form %d, and this nbdctl knows form %d: "+
		"use one that knows it, too, or disconnect and connect", version, passageVersion)
}

// sorted returns the files by what they are for.
func sorted(descriptors []string, files []*os.File) (map[string][]*os.File, error) {
	if len(descriptors) != len(files) {
		return nil, fmt.Errorf("the other process tells of %d descriptors, and has sent %d",
			len(descriptors), len(files))
	}
	of := make(map[string][]*os.File)
	for i, d := range descriptors {
		of[d] = append(of[d], files[i])
	}
	for _, one := range []string{passLock, passControl} {
		if len(of[one]) != 1 {
			return nil, fmt.Errorf("the other process has sent %d descriptors of its %s", len(of[one]), one)
		}
	}
	n := len(of[passLock]) + len(of[passControl]) + len(of[passBackend]) + len(of[passKeeper])
	if n != len(files) || len(of[passKeeper]) > 1 {
		return nil, fmt.Errorf("the other process has sent %d descriptors that are not known here", len(files)-n)
	}
	return of, nil
}

// inheritState takes the record, the directory with its lock, and the control socket. The lock
// belongs to s afterwards.
func (s *succession) inheritState(p *passage, of map[string][]*os.File) (err error) {
	h := s.host
	s.state = &stateDir{path: filepath.Join(h.Store.dir, p.Record.UUID), lock: of[passLock][0]}
	if p.Record.UUID != h.record.UUID || !isUUID(p.Record.UUID) {
		return fmt.Errorf("the other process serves the device %q, and %q is asked for", p.Record.UUID, h.record.UUID)
	}
	ours, err1 := s.state.lock.Stat()
	there, err2 := os.Stat(filepath.Join(s.state.path, "lock"))
	switch err := errors.Join(err1, err2); {
	case errors.Is(err, fs.ErrNotExist):
		return exit.With(exit.NotFound, "%s is not connected any more: its state directory has gone",
			h.record.Device())
	case err != nil:
		return fmt.Errorf("state directory: %w", err)
	}
	if !os.SameFile(ours, there) {
		return fmt.Errorf("state directory: %s is not the one of the other process", s.state.path)
	}
	if p.Secrets != nil {
		if p.Record.Spec.Secrets, err = secret.Receive(bytes.NewReader(p.Secrets)); err != nil {
			return err
		}
	}
	h.record, h.Spec = p.Record, p.Record.Spec
	h.redactor = h.Spec.Secrets.Redactor()
	h.logFile.setMode(h.logMode())
	h.record.PID, h.record.Passage = os.Getpid(), passageVersion
	if s.control, err = net.FileListener(of[passControl][0]); err != nil {
		return fmt.Errorf("control socket: %w", err)
	}
	for _, f := range of[passKeeper] {
		if s.keeper, err = unixConn(f); err != nil {
			return fmt.Errorf("keeper: %w", err)
		}
	}
	s.publish, err = h.record.prepare(s.state.path, nextRecord)
	return err
}

// keepOn starts a keeper of this program, in the place of that of the other process, which stays if
// there can be no other.
func (s *succession) keepOn(device *blockdev.Device) {
	h := s.host
	err := h.keep(device)
	if err != nil {
		h.log.Error("there is no new keeper", "error", err)
	}
	switch {
	case s.keeper == nil:
	case err != nil:
		h.unkept(h.keepBy(s.keeper, device))
	default:
		if err := watchKeeper(s.keeper).release(); err != nil {
			h.log.Warn("there are two keepers", "reason", err)
		}
	}
	s.keeper = nil
}

// close lets go of what nobody has taken.
func (s *succession) close() {
	if s.control != nil {
		s.control.Close()
	}
	if s.keeper != nil {
		s.keeper.Close()
	}
	if s.host.state == nil && s.state != nil {
		s.state.lock.Close()
	}
}
