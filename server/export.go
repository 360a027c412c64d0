package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/server/internal/loglimit"
	"github.com/nbdctl/nbdctl/server/internal/pace"
	"github.com/nbdctl/nbdctl/server/internal/rangelock"
	"github.com/nbdctl/nbdctl/server/internal/resend"
	"github.com/nbdctl/nbdctl/server/wire"
)

const (
	// defaultMaxInFlight is the queue depth of the Linux client: it never has more requests in
	// flight on one connection.
	defaultMaxInFlight = 128
	// defaultSlowRequest is far beyond what a request takes as long as nothing is wrong, and well
	// before anybody gives up.
	defaultSlowRequest = time.Second
	// maxInFlightBytes bounds the payload memory of one connection. It lets two requests of the
	// largest size overlap, and a full queue of requests up to 512 KiB.
	maxInFlightBytes = 64 << 20
	// maxBlockSize is the largest block size that the protocol lets a server insist on ("Block size
	// constraints").
	maxBlockSize = 64 << 10
)

// Options say how an export is served. The zero value is ready to use.
type Options struct {
	// ReadOnly refuses all writes, also where the backend takes them.
	ReadOnly bool
	// BlockSize, in bytes, divides offset and length of every request; others are refused. A power
	// of two up to 65536. 0: what the backend needs, else 1.
	BlockSize int
	// Description is what people are told of the export who list those of a server, or ask. It is
	// UTF-8 without zero bytes, and at most 4096 bytes long.
	Description string
	// MaxInFlight bounds the requests that one connection executes at once. 0: 128.
	MaxInFlight int
	// SlowRequest is how long a request may take, from when it was received until its reply is
	// ready, without a record in the log. 0: a second, which a sound disk needs only when it is
	// overwhelmed. Negative: as long as it likes.
	SlowRequest time.Duration
	// Logger takes a record for each request that failed or was slow, with operation, offset,
	// length and error number, up to 10 of each sort in 10 seconds and then the number of the
	// others. Requests do not wait for it. nil: none.
	Logger *slog.Logger
}

// An Export is a backend on offer: what all its connections share. It does not own the backend,
// which must stay open until every Transmit has returned, or Swap has. Safe for concurrent use.
type Export struct {
	dev         backends.Device // for who is in Transmit; Swap changes it, and can, while they are held up
	can         abilities
	size        atomic.Int64 // requests are checked against it
	description atomic.Pointer[string]
	contexts    []metaContext // of which clients choose
	blockSize   int
	maxLength   uint64 // of a READ or WRITE, in bytes
	preferred   int    // block size that is offered
	flags       wire.Flags
	maxInFlight int
	slowRequest time.Duration
	events      *loglimit.Limiter
	paces       pace.Set
	faulty      atomic.Bool // memory of the backend was not there when it was sent
	locks       rangelock.Table
	judge       resend.Judge
	admission   admission
	watchful    atomic.Bool // it matters at once when a client hangs up
	direct      atomic.Bool // the backend takes writes without a lock (backends.WriterAtFrom)
	lastError   atomic.Pointer[RequestError]
	losses      losses
	several     atomic.Bool // there were two connections at the same time

	mu       sync.Mutex         // guards the four below
	live     map[*Conn]struct{} // in Transmit
	finished Stats              // of those that were
	held     *Hold              // unless nil, no connection may begin before its end
	tending  *time.Timer        // until requests that were sent again are looked at; nil: they are not

	changing chan struct{} // holds a value in Resize, Swap, Sync and a Hold; guards the one below
	syncing  <-chan error  // has the result of a sync that was given up; nil: there is none
}

// NewExport offers b. The size of b is taken now, and stays until Resize; the methods of b are
// called concurrently, and never with a range outside that size.
func NewExport(b backends.Backend, o Options) (*Export, error) {
	if b == nil {
		return nil, errors.New("server: no backend")
	}
	dev := backends.Probe(b)
	e := &Export{
		dev:         dev,
		can:         abilitiesOf(&dev),
		blockSize:   o.BlockSize,
		maxLength:   wire.MaxPayload,
		preferred:   dev.BlockSizes.Preferred,
		maxInFlight: o.MaxInFlight,
		slowRequest: o.SlowRequest,
		events:      newEvents(o.Logger),
		live:        make(map[*Conn]struct{}),
		changing:    make(chan struct{}, 1),
	}
	e.admission.changed.L = &e.admission.mu
	size := dev.Size()
	e.size.Store(size)
	need := max(1, dev.BlockSizes.Minimum)
	if e.blockSize == 0 {
		e.blockSize = need
	}
	if m := dev.BlockSizes.Maximum; m > 0 && m < wire.MaxPayload {
		e.maxLength = uint64(m)
	}
	if e.maxInFlight == 0 {
		e.maxInFlight = defaultMaxInFlight
	}
	switch {
	case e.slowRequest == 0:
		e.slowRequest = defaultSlowRequest
	case e.slowRequest < 0:
		e.slowRequest = math.MaxInt64
	}
	switch {
	case size < 0:
		return nil, fmt.Errorf("server: the backend has a negative size, %d bytes", size)
	case e.blockSize < 1 || e.blockSize > maxBlockSize || e.blockSize&(e.blockSize-1) != 0:
		return nil, fmt.Errorf("server: block size %d is not a power of two from 1 to %d", e.blockSize, maxBlockSize)
	case e.blockSize < need:
		return nil, fmt.Errorf("server: block size %d is below the %d bytes that the backend needs", e.blockSize, need)
	case size%int64(e.blockSize) != 0:
		return nil, fmt.Errorf("server: size %d is not a multiple of the block size, %d bytes", size, e.blockSize)
	case e.maxInFlight < 1:
		return nil, fmt.Errorf("server: %d requests in flight are too few to serve any", e.maxInFlight)
	}
	err := e.SetDescription(o.Description)
	if err != nil {
		return nil, err
	}
	if e.contexts, err = contextsOf(&dev); err != nil {
		return nil, err
	}
	e.flags = promise(dev, o.ReadOnly)
	e.noteAbilities()
	return e, nil
}

// promise returns the flags of an export of dev.
//
// Several connections are always fine: Sync covers every write that was replied to on any of them,
// by contract. Flush, FUA and zeroes are always there for a writable export because the server does
// what the backend does not: a backend without Sync has every completed write durable already, FUA
// becomes a write and a Sync, zeroes are written. Only trim cannot be imitated. To be quick, and to
// fetch early, is a matter of the backend's.
func promise(dev backends.Device, readOnly bool) wire.Flags {
	f := wire.FlagHasFlags | wire.FlagCanMultiConn
	if dev.Cacher != nil {
		f |= wire.FlagSendCache
	}
	if readOnly || dev.WriterAt == nil {
		return f | wire.FlagReadOnly
	}
	f |= wire.FlagSendFlush | wire.FlagSendFUA | wire.FlagSendWriteZeroes
	if dev.Trimmer != nil {
		f |= wire.FlagSendTrim
	}
	if dev.Zeroer != nil {
		f |= wire.FlagSendFastZero
	}
	return f
}

// change begins a change of the export, of which there is one at a time.
func (e *Export) change(ctx context.Context) error {
	select {
	case e.changing <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("server: the export is being changed by another call: %w", context.Cause(ctx))
	}
}

func (e *Export) unchange() { <-e.changing }

// noteAbilities keeps what others than the loops ask of the backend.
func (e *Export) noteAbilities() {
	e.direct.Store(e.dev.WriteFrom != nil)
	e.watchful.Store(e.judge.Patience().Resend > 0 || e.dev.ReadContext != nil || e.dev.WriteContext != nil)
}

// Size returns the size in bytes.
func (e *Export) Size() int64 { return e.size.Load() }

// BlockSize returns the number of bytes that divides offset and length of every request.
func (e *Export) BlockSize() int { return e.blockSize }

// SetDescription changes what people are told of the export from now on. Options.Description says
// what it can be.
func (e *Export) SetDescription(text string) error {
	if err := wire.CheckString(text); err != nil {
		return fmt.Errorf("server: description: %w", err)
	}
	e.description.Store(&text)
	return nil
}

// Flags returns what the export promises. They never change.
func (e *Export) Flags() wire.Flags { return e.flags }

// Stats returns the sum over all connections, also those that have ended.
func (e *Export) Stats() Stats {
	e.mu.Lock()
	defer e.mu.Unlock()
	s := e.finished
	for c := range e.live {
		t := c.Stats()
		s.Add(&t)
	}
	return s
}

// LastError returns the request that failed last, on any connection, or nil. The value must not be
// changed.
func (e *Export) LastError() *RequestError { return e.lastError.Load() }

// enlist begins to serve c, and counts it among the live connections. While the export is held it
// waits.
func (e *Export) enlist(c *Conn) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := c.begin(); err != nil {
		return err
	}
	for e.held != nil {
		h := e.held
		e.mu.Unlock()
		<-h.release
		e.mu.Lock()
		if h.left {
			_ = c.stop() // Who can't be told has ended.
		}
	}
	e.live[c] = struct{}{}
	e.tendLater()
	if len(e.live) > 1 {
		e.several.Store(true)
	}
	return nil
}

// retire keeps the counts of c, which will not change any more, without keeping c.
func (e *Export) retire(c *Conn) {
	e.mu.Lock()
	defer e.mu.Unlock()
	s := c.Stats()
	e.finished.Add(&s)
	delete(e.live, c)
}
