package blockdev

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/nbdnl"
)

// A device passes over a Unix stream socket so, from the process that has it to its successor:
//
//	the magic, 4 bytes; the length of the Document and the number of descriptors, 32 bits each,
//	big endian; the descriptors, a byte for each message of them (SCM_RIGHTS); the Document
//	successor: {"ready": true}     all is checked, nothing is touched
//	process:   {"go": true}        it will not serve the device any more
//	successor: {"serving": true}
//
// Each line may be {"error": "…"} instead, and be the last. Before go the process serves on if
// anything goes wrong. After it, it does if the successor dies, with new connections.

const (
	passMagic = 0x6e626448
	// maxDocument bounds the length of a Document, in bytes. What is unread of a connection is at
	// most a write of maxSectorsKB and what its inbox holds.
	maxDocument = 1 << 30
	// maxLine bounds a line, in bytes.
	maxLine = 64 << 10
	// rightsPerMessage is how many descriptors go in one message; the kernel takes 253
	// (SCM_MAX_FD).
	rightsPerMessage = 200
	// maxPassed bounds the descriptors of a device: connections, a lease, and those of the program.
	maxPassed = maxConnections + 1 + 255
)

// A line is what the two say to each other behind the Document.
type line struct {
	Ready   bool   `json:"ready,omitempty"`
	Go      bool   `json:"go,omitempty"`
	Serving bool   `json:"serving,omitempty"`
	Error   string `json:"error,omitempty"`
}

// HandOverTo is HandOver to the process at the other end of c, a Unix stream socket, which calls
// TakeOver. With nil that process serves the device, which is Done here as after
// Handover.Complete. With an error it goes on here as if nothing had been: ctx ended, the backend
// was not done in time, or the other process has taken too long, has refused the device, or died.
// All of it is to be done in half of Timeout from when the device stands still.
//
// Only if the other process dies when everything was said, and may have served a few requests, the
// device gets new connections (Handover.Reconnect), unless it is one of ConnectRemote. If the other
// process gives no sign of life in that moment, or letting go fails, the error matches
// ErrHandedOver, and the device is the other's. c stays open, and is of no further use after an
// error.
func (d *Device) HandOverTo(ctx context.Context, c *net.UnixConn, o HandOverOptions) error {
	h, err := d.HandOver(ctx, o)
	if err != nil {
		return err
	}
	fail := func(err error) error { return fmt.Errorf("blockdev: %s is not handed over: %w", d.Path(), err) }
	bounded, cancel := context.WithDeadlineCause(ctx, h.until, errTooLong)
	defer cancel()
	lines := newLines(c)
	err = heeding(bounded, c, func() error { return send(c, &h.Document, h.Files) })
	if err == nil {
		err = lines.expect(bounded, func(l line) bool { return l.Ready })
	}
	if err == nil {
		err = lines.say(line{Go: true}) // What was not sent can't have been read.
	}
	if err != nil {
		h.Resume()
		_ = lines.say(line{Error: err.Error()}) // It may wait for an answer, or be gone.
		return fail(err)
	}
	// What becomes of the device is the other's to say from here on.
	last, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), d.Timeout()/2, errTooLong)
	defer cancel()
	err = lines.expect(last, func(l line) bool { return l.Serving })
	var said *saidError
	switch {
	case errors.As(err, &said): // and has read nothing (Adopt)
		h.Resume()
		return fail(err)
	case err == nil:
		if err := h.Complete(); err != nil {
			return errors.Join(ErrHandedOver, err)
		}
		return nil
	case errors.Is(err, errTooLong), errors.Is(err, net.ErrClosed): // It may well serve the device.
		return errors.Join(fail(err), ErrHandedOver, h.Complete())
	}
	h.Reconnect()
	if d.export == nil {
		return fail(fmt.Errorf("the other process has not begun to watch over it, and it is watched here: %w", err))
	}
	return fail(fmt.Errorf("the other process has not begun to serve it, and it is connected again: %w", err))
}

// An Opener returns the backend for a device that is handed over, by what the Document says, above
// all its Note, and by the descriptors that the program has added, which belong to it. It is called
// while the device stands still, so what takes long is to be ready before.
type Opener func(ctx context.Context, doc *Document, files []*os.File) (backends.Backend, error)

// A RemoteOpener is an Opener for a device of ConnectRemote (Document.Remote). It returns the
// export that the kernel is connected to.
type RemoteOpener func(ctx context.Context, doc *Document, files []*os.File) (Remote, error)

// TakeOver is Adopt of a device that the process at the other end of c, a Unix stream socket, hands
// over by HandOverTo, with the backend that open returns. If anything goes wrong, ctx ends, or open
// returns an error, the other process is told, and goes on with the device; a backend that open has
// returned is for the caller to close. c stays open.
//
// A device of ConnectRemote is refused before open is called, with errors.ErrUnsupported:
// TakeOverEither is for those, too.
func TakeOver(ctx context.Context, c *net.UnixConn, open Opener, o Options) (*Device, error) {
	return machine{}.takeOverFrom(ctx, c, open, o)
}

// TakeOverEither is TakeOver for whichever device comes: that of a backend with what open returns,
// and one of ConnectRemote, by AdoptRemote, with what remote returns. A nil one refuses its kind.
func TakeOverEither(
	ctx context.Context, c *net.UnixConn, open Opener, remote RemoteOpener, o Options,
) (*Device, error) {
	return machine{}.takeOverEither(ctx, c, open, remote, o)
}

func (m machine) takeOverFrom(ctx context.Context, c *net.UnixConn, open Opener, o Options) (*Device, error) {
	return m.takeOverEither(ctx, c, open, nil, o)
}

func (m machine) takeOverEither(
	ctx context.Context, c *net.UnixConn, open Opener, remote RemoteOpener, o Options,
) (*Device, error) {
	var doc *Document
	var files []*os.File
	err := heeding(ctx, c, func() (err error) {
		doc, files, err = receive(c)
		return err
	})
	if err != nil {
		closeAll(files)
		return nil, fmt.Errorf("blockdev: no device was handed over: %w", err)
	}
	lines := newLines(c)
	refuse := func(err error) error {
		_ = lines.say(line{Error: err.Error()}) // If it is not heard, nobody is there.
		return err
	}
	if err := doc.check(len(files)); err != nil {
		closeAll(files)
		return nil, refuse(err)
	}
	if doc.Remote && remote == nil || !doc.Remote && open == nil {
		closeAll(files)
		return nil, refuse(doc.isFor(!doc.Remote))
	}
	with, err := m.counterpart(ctx, doc, open, remote, doc.Extra(files))
	if err != nil {
		closeAll(files[:len(files)-len(doc.Extra(files))])
		return nil, refuse(fmt.Errorf("blockdev: %s: %w", nbdnl.Path(doc.Index), err))
	}
	d, err := m.inherit(ctx, *doc, files, with, o, func() error {
		if err := lines.say(line{Ready: true}); err != nil {
			return err
		}
		return lines.expectGo(ctx)
	})
	if err != nil {
		return nil, refuse(err)
	}
	_ = lines.say(line{Serving: true}) // If it is not heard, nobody is there.
	return d, nil
}

// counterpart opens what is to go on with a device.
func (m machine) counterpart(
	ctx context.Context, doc *Document, open Opener, remote RemoteOpener, files []*os.File,
) (maker, error) {
	if doc.Remote {
		r, err := remote(ctx, doc, files)
		return m.watching(r), err
	}
	b, err := open(ctx, doc, files)
	return m.serving(b), err
}

var errTooLong = errors.New("the other process takes too long")

// heeding does something with c, and ends it with ctx. No deadline is left behind.
func heeding(ctx context.Context, c net.Conn, do func() error) error {
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = c.SetDeadline(time.Unix(1, 0))
		close(ended)
	})
	err := do()
	if !stop() {
		<-ended
		_ = c.SetDeadline(time.Time{})
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return context.Cause(ctx)
		}
	}
	return err
}

// lines are said and heard over a connection.
type lines struct {
	c  net.Conn
	in *bufio.Reader
}

func newLines(c net.Conn) *lines { return &lines{c, bufio.NewReaderSize(c, maxLine)} }

// sayPatience bounds the sending of a line, for which there is room if the other process takes any.
const sayPatience = time.Second

func (l *lines) say(what line) error {
	b, err := json.Marshal(what)
	if err != nil {
		return err
	}
	_ = l.c.SetWriteDeadline(time.Now().Add(sayPatience))
	defer func() { _ = l.c.SetWriteDeadline(time.Time{}) }()
	_, err = l.c.Write(append(b, '\n'))
	return err
}

// expect waits for a line until ctx ends, which is to be of that kind.
func (l *lines) expect(ctx context.Context, kind func(line) bool) error {
	var b []byte
	err := heeding(ctx, l.c, func() (err error) {
		b, err = l.in.ReadSlice('\n')
		return err
	})
	var what line
	switch {
	case err == io.EOF, errors.Is(err, syscall.ECONNRESET): // It has not read all that was said.
		return errors.New("the other process has hung up")
	case err != nil:
		return err
	}
	if err := json.Unmarshal(b, &what); err != nil {
		return fmt.Errorf("the other process says what is not understood: %w", err)
	}
	switch {
	case what.Error != "":
		return &saidError{what.Error}
	case !kind(what):
		return fmt.Errorf("the other process says %q out of its turn", b)
	}
	return nil
}

// lastLook is for what has come before.
const lastLook = 10 * time.Millisecond

// expectGo waits for go, or for the end of the other process, for as long as ctx says. A go that
// has come counts whatever that says: the other process may have let go of the device.
func (l *lines) expectGo(ctx context.Context) error {
	goes := func(l line) bool { return l.Go }
	err := l.expect(ctx, goes)
	if err == nil || ctx.Err() == nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastLook)
	defer cancel()
	if l.expect(ctx, goes) == nil {
		return nil
	}
	return err
}

// A saidError is what the other process has said to be wrong.
type saidError struct{ text string }

func (e *saidError) Error() string { return "the other process says: " + e.text }

// send sends a document and descriptors.
func send(c *net.UnixConn, doc *Document, files []*os.File) error {
	b, err := json.Marshal(doc)
	if err != nil {
		return err
	}
	if len(files) > maxPassed || len(b) > maxDocument {
		return fmt.Errorf("a document of %d bytes with %d descriptors is too much", len(b), len(files))
	}
	head := binary.BigEndian.AppendUint32(nil, passMagic)
	head = binary.BigEndian.AppendUint32(head, uint32(len(b)))
	head = binary.BigEndian.AppendUint32(head, uint32(len(files)))
	if _, err := c.Write(head); err != nil {
		return err
	}
	for len(files) > 0 {
		n := min(len(files), rightsPerMessage)
		if err := sendFiles(c, files[:n]); err != nil {
			return err
		}
		files = files[n:]
	}
	_, err = c.Write(b)
	return err
}

// receive receives what send has sent.
func receive(c *net.UnixConn) (_ *Document, files []*os.File, err error) {
	defer func() {
		if err != nil {
			closeAll(files)
		}
	}()
	var head [12]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return nil, nil, err
	}
	magic, length := binary.BigEndian.Uint32(head[:]), binary.BigEndian.Uint32(head[4:])
	count := int(binary.BigEndian.Uint32(head[8:]))
	switch {
	case magic != passMagic:
		return nil, nil, fmt.Errorf("it begins with %#08x, not as a device does", magic)
	case length > maxDocument || count > maxPassed:
		return nil, nil, fmt.Errorf("a document of %d bytes with %d descriptors is too much", length, count)
	}
	for len(files) < count {
		more, err := receiveFiles(c)
		files = append(files, more...)
		if err != nil {
			return nil, files, err
		}
		if len(more) == 0 || len(files) > count {
			return nil, files, fmt.Errorf("%d descriptors came, of %d", len(files), count)
		}
	}
	b, err := io.ReadAll(io.LimitReader(c, int64(length))) // It takes memory for what has come only.
	if err == nil && len(b) < int(length) {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return nil, files, err
	}
	doc := new(Document)
	if err := json.Unmarshal(b, doc); err != nil {
		return nil, files, fmt.Errorf("the document is not understood: %w", err)
	}
	return doc, files, nil
}
