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
	// maxDocument bounds what is believed of the length of a Document, in bytes: what is unread of
	// 256 connections, and more.
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
// was not done in time, or the other process has taken more than half of Timeout, has refused the
// device, or died. Only if it died when
// everything was said, and may have served a few requests, the device gets new connections
// (Handover.Reconnect); and if ctx ends at that moment without a sign of life, the device is the
// other's, and the error matches ErrHandedOver. c stays open.
func (d *Device) HandOverTo(ctx context.Context, c *net.UnixConn, o HandOverOptions) error {
	h, err := d.HandOver(ctx, o)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, d.Timeout()/2, errors.New("the other process takes too long"))
	defer cancel()
	defer withContext(ctx, c)()
	fail := func(err error) error {
		return fmt.Errorf("blockdev: %s is not handed over: %w", d.Path(), because(ctx, err))
	}
	lines := newLines(c)
	if err = send(c, &h.Document, h.Files); err == nil {
		err = lines.expect(func(l line) bool { return l.Ready })
	}
	if err != nil {
		h.Resume()
		lines.say(line{Error: err.Error()}) // It may wait for an answer.
		return fail(err)
	}
	if err := lines.say(line{Go: true}); err != nil {
		// What was not sent can't have been read.
		h.Resume()
		return fail(err)
	}
	err = lines.expect(func(l line) bool { return l.Serving })
	switch {
	case err == nil:
		return h.Complete()
	case ctx.Err() != nil:
		return errors.Join(fail(err), ErrHandedOver, h.Complete())
	}
	h.Reconnect()
	return fail(fmt.Errorf("the other process has not begun to serve it, and it is connected again: %w", err))
}

// An Opener returns the backend for a device that is handed over, by what the Document says, above
// all its Note, and by the descriptors that the program has added, which belong to it. It is called
// while the device stands still, so what takes long is to be ready before.
type Opener func(ctx context.Context, doc *Document, files []*os.File) (backends.Backend, error)

// TakeOver is Adopt of a device that the process at the other end of c, a Unix stream socket, hands
// over by HandOverTo, with the backend that open returns. If anything goes wrong, ctx ends, or open
// returns an error, the other process is told, and goes on with the device; a backend that open has
// returned is for the caller to close. c stays open.
func TakeOver(ctx context.Context, c *net.UnixConn, open Opener, o Options) (*Device, error) {
	return machine{}.takeOverFrom(ctx, c, open, o)
}

func (m machine) takeOverFrom(ctx context.Context, c *net.UnixConn, open Opener, o Options) (*Device, error) {
	defer withContext(ctx, c)()
	doc, files, err := receive(c)
	if err != nil {
		return nil, fmt.Errorf("blockdev: no device was handed over: %w", because(ctx, err))
	}
	lines := newLines(c)
	refuse := func(err error) error {
		lines.say(line{Error: err.Error()}) // It notices as well when c is closed.
		return because(ctx, err)
	}
	if err := doc.check(len(files)); err != nil {
		closeAll(files)
		return nil, refuse(err)
	}
	b, err := open(ctx, doc, doc.Extra(files))
	if err != nil {
		closeAll(files[:len(files)-len(doc.Extra(files))])
		return nil, refuse(fmt.Errorf("blockdev: %s: %w", nbdnl.Path(doc.Index), err))
	}
	d, err := m.takeOver(ctx, *doc, files, b, o, func() error {
		if err := lines.say(line{Ready: true}); err != nil {
			return err
		}
		return lines.expect(func(l line) bool { return l.Go })
	})
	if err != nil {
		return nil, refuse(err)
	}
	lines.say(line{Serving: true}) // Who does not hear it sees that this process lives.
	return d, nil
}

// withContext has what is done with c end with ctx, until it is called back.
func withContext(ctx context.Context, c net.Conn) (done func()) {
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	return func() {
		if stop() {
			return
		}
		_ = c.SetDeadline(time.Time{})
	}
}

// because returns why something has failed: if ctx has ended, that.
func because(ctx context.Context, err error) error {
	if ctx.Err() != nil && errors.Is(err, os.ErrDeadlineExceeded) {
		return context.Cause(ctx)
	}
	return err
}

// lines are said and heard over a connection.
type lines struct {
	c  net.Conn
	in *bufio.Reader
}

func newLines(c net.Conn) *lines { return &lines{c, bufio.NewReaderSize(c, maxLine)} }

func (l *lines) say(what line) error {
	b, err := json.Marshal(what)
	if err != nil {
		return err
	}
	_, err = l.c.Write(append(b, '\n'))
	return err
}

// expect waits for a line, which is to be of that kind.
func (l *lines) expect(kind func(line) bool) error {
	b, err := l.in.ReadSlice('\n')
	var what line
	switch {
	case err == io.EOF:
		return errors.New("the other process has hung up")
	case err != nil:
		return err
	}
	if err := json.Unmarshal(b, &what); err != nil {
		return fmt.Errorf("the other process says what is not understood: %w", err)
	}
	switch {
	case what.Error != "":
		return fmt.Errorf("the other process says: %s", what.Error)
	case !kind(what):
		return fmt.Errorf("the other process says %q out of its turn", b)
	}
	return nil
}

// send sends a document and descriptors.
func send(c *net.UnixConn, doc *Document, files []*os.File) error {
	b, err := json.Marshal(doc)
	if err != nil {
		return err
	}
	if len(files) > maxPassed {
		return fmt.Errorf("%d descriptors are more than %d", len(files), maxPassed)
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
