package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/nbdctl/nbdctl/server/wire"
)

const (
	defaultOutage   = time.Minute
	defaultMinPause = 100 * time.Millisecond
	defaultMaxPause = 5 * time.Second
	defaultAttempt  = 10 * time.Second
)

// Reconnect says how connections are replaced that are lost. The zero value is ready to use.
//
// Requests that were in flight on a connection that is lost are sent again on another one, and
// those that come meanwhile wait, until Timeout has passed since no connection was left: then all
// that wait fail, and those that come fail at once, while the client goes on trying. A new
// connection counts only if its export is the one that was there before, as far as a server tells:
// name, size, block sizes, flags.
//
// A server must promise two things for that. What it has acknowledged it must not lose when it
// ends; a file of a machine that goes on is not lost, but what was not synced is if that machine
// goes down, too. And what it has received on a connection that is lost it must not execute after
// it has accepted another: an old write would end on top of newer data. Servers that end when they
// are killed keep the second promise, and those that look at what overlaps (nbdctl serve). The
// client does its part: of two writes to the same range the second is not sent before the first was
// answered, if its callers wait for one another.
type Reconnect struct {
	// Timeout is how long requests wait for a server that is away. 0: a minute.
	Timeout time.Duration
	// MinPause and MaxPause are between attempts: the first comes at once, then each pause is twice
	// as long as the one before, give or take a quarter. 0: 100 ms and 5 s.
	MinPause, MaxPause time.Duration
	// Attempt is how long the server may take to connect and to negotiate. 0: 10 seconds.
	Attempt time.Duration
	// Await has Dial wait for a server that is away, until its context ends. An export that is not
	// there is an error at once.
	Await bool
	// Notify is told each time when a connection was lost or replaced. Who replaces it waits for
	// the return, and Close for both, so it must not call Close. nil: nobody is told.
	Notify func(State)
}

func (p *Reconnect) timeout() time.Duration { return otherwise(p.Timeout, defaultOutage) }

func otherwise(d, unset time.Duration) time.Duration {
	if d == 0 {
		return unset
	}
	return d
}

// A State is how a client is connected.
type State struct {
	// Alive is how many of the connections are.
	Alive int
	// Since is when the last of them was lost; zero while any is alive.
	Since time.Time
	// Err is why the connection was lost that was lost last, or why the last attempt to replace it
	// has failed; nil if all are alive.
	Err error
	// Replaced is how many connections were replaced so far.
	Replaced int64
}

// An outage is what is known of connections that are lost.
type outage struct {
	kept    bool           // they are replaced; does not change
	ended   chan struct{}  // closed by end
	tending sync.WaitGroup // those who replace them

	mu      sync.Mutex // guards those below
	state   State
	changed chan struct{} // closed when state changes, and another is made
}

// keep has lost connections replaced, if that is wanted. since is from when on there was none, if
// all are missing.
func (c *Client) keep(u URI, config *tls.Config, since time.Time) {
	if c.options.Reconnect == nil {
		return
	}
	o := &c.outage
	o.kept, o.ended, o.changed = true, make(chan struct{}), make(chan struct{})
	for i := range c.conns {
		if !c.conns[i].Load().missing {
			o.state.Alive++
		}
	}
	if o.state.Alive < len(c.conns) {
		o.state.Err = errMissing
	}
	if o.state.Alive == 0 {
		o.state.Since = since
	}
	for i := range c.conns {
		o.tending.Add(1)
		go c.tend(i, u, config)
	}
}

// end has nothing replaced any more, and waits until that is so.
func (o *outage) end() {
	if o.kept {
		close(o.ended)
		o.tending.Wait()
	}
}

// change changes the state, and tells of it.
func (o *outage) change(f func(*State), notify func(State)) {
	o.mu.Lock()
	f(&o.state)
	state := o.state
	close(o.changed)
	o.changed = make(chan struct{})
	o.mu.Unlock()
	if notify != nil {
		notify(state)
	}
}

// State returns how the client is connected.
func (c *Client) State() State {
	if c.outage.kept {
		c.outage.mu.Lock()
		defer c.outage.mu.Unlock()
		return c.outage.state
	}
	var s State
	for i := range c.conns {
		if k := c.conns[i].Load(); k.alive() {
			s.Alive++
		} else {
			s.Err = k.ended()
		}
	}
	return s
}

// tend replaces a connection each time that it is lost.
func (c *Client) tend(i int, u URI, config *tls.Config) {
	defer c.outage.tending.Done()
	policy := c.options.Reconnect
	pauses := policy.pauses()
	for {
		k := c.conns[i].Load()
		select {
		case <-k.dead:
		case <-c.outage.ended:
			return
		}
		if k.answered.Load() {
			pauses = policy.pauses() // A server that answers nothing is not asked again at once.
		}
		c.outage.change(func(s *State) {
			s.Err = k.ended()
			if k.missing {
				return // It never counted.
			}
			if s.Alive--; s.Alive == 0 {
				s.Since = time.Now()
			}
		}, policy.Notify)
		k.close() // It waits for what is left of it.
		k = c.replacement(u, config, pauses)
		if k == nil {
			return
		}
		c.conns[i].Store(k)
		c.outage.change(func(s *State) {
			s.Alive++
			s.Replaced++
			s.Since = time.Time{}
			if s.Alive == len(c.conns) {
				s.Err = nil
			}
		}, policy.Notify)
	}
}

// replacement connects until that succeeds, or the client is closed: then there is none.
func (c *Client) replacement(u URI, config *tls.Config, p *pauses) *conn {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		select {
		case <-c.outage.ended:
			cancel()
		case <-stop:
		}
	}()
	options := c.options
	options.NoExtended, options.NoStructured = !c.agreed.Extended, !c.agreed.Structured
	s, err := c.options.Reconnect.attempt(ctx, p, func(ctx context.Context) (*Session, error) {
		if fresh, err := u.tlsConfig(&options); err == nil {
			config = fresh // Certificates do not live as long as a device.
		}
		s, err := u.session(ctx, &options, config)
		if err == nil {
			if err = c.agreed.continues(&s.Agreement, len(c.conns) > 1); err != nil {
				s.NetConn.Close()
			}
		}
		return s, err
	}, func(err error) bool {
		if before := c.State().Err; before == nil || before.Error() != err.Error() {
			c.outage.change(func(s *State) { s.Err = err }, c.options.Reconnect.Notify)
		}
		return true
	})
	if err != nil {
		return nil
	}
	return newConn(s, &c.options)
}

// pauses are what is between attempts.
type pauses struct{ next, least, longest time.Duration }

// pauses begin with none.
func (p *Reconnect) pauses() *pauses {
	least := max(otherwise(p.MinPause, defaultMinPause), time.Microsecond)
	return &pauses{least: least, longest: max(otherwise(p.MaxPause, defaultMaxPause), least)}
}

// take returns the next pause.
func (p *pauses) take() time.Duration {
	now := p.next
	p.next = min(max(2*p.next, p.least), p.longest)
	if now == 0 {
		return 0
	}
	return now*3/4 + rand.N(now/2+1)
}

// attempt connects until that succeeds, ctx ends, or the error is one that goOn does not take.
func (p *Reconnect) attempt(ctx context.Context, pauses *pauses, connect func(context.Context) (*Session, error),
	goOn func(error) bool) (*Session, error) {
	timer := time.NewTimer(pauses.take())
	defer timer.Stop()
	var last error
	for {
		select {
		case <-timer.C:
		case <-ctx.Done():
			if last == nil {
				last = errNoAnswer
			}
			return nil, fmt.Errorf("%w; before that: %w", context.Cause(ctx), last)
		}
		limited, cancel := context.WithTimeoutCause(ctx, otherwise(p.Attempt, defaultAttempt), errNoAnswer)
		s, err := connect(limited)
		cancel()
		if err == nil || ctx.Err() == nil && !goOn(err) {
			return s, err
		}
		if last == nil || ctx.Err() == nil {
			last = err // One that ctx has cut short says nothing.
		}
		timer.Reset(pauses.take())
	}
}

var errNoAnswer = errors.New("nbd: the server does not answer")

// await connects to a server that may be away still. It does not wait for one that has an answer.
func (u *URI) await(ctx context.Context, o *Options, config *tls.Config) (*Session, error) {
	connect := func(ctx context.Context) (*Session, error) { return u.session(ctx, o, config) }
	return o.Reconnect.attempt(ctx, o.Reconnect.pauses(), connect, func(err error) bool {
		var refused *OptionError
		var broken *ProtocolError
		var unverified *tls.CertificateVerificationError
		return !errors.As(err, &broken) && !errors.As(err, &unverified) &&
			(!errors.As(err, &refused) || refused.Reply == wire.RepErrShutdown)
	})
}

// continues tells how a new session differs from what was agreed on before, where that matters.
// several tells that there are connections beside it.
func (a *Agreement) continues(b *Agreement, several bool) error {
	needed := a.Flags &^ (wire.FlagRotational | wire.FlagSendDF | wire.FlagBlockStatusPayload)
	if !several {
		needed &^= wire.FlagCanMultiConn
	}
	var what string
	switch {
	case b.Size != a.Size:
		what = fmt.Sprintf("it has %d bytes, and had %d", b.Size, a.Size)
	case b.Name != a.Name:
		what = fmt.Sprintf("it is called %q, and was %q", b.Name, a.Name)
	case b.Flags&needed != needed || (b.Flags^a.Flags)&wire.FlagReadOnly != 0:
		what = fmt.Sprintf("its flags are %v, and were %v", b.Flags, a.Flags)
	case b.BlockSizes.Minimum > max(a.BlockSizes.Minimum, 1) || b.longest() < a.longest():
		what = fmt.Sprintf("its block sizes are %+v, and were %+v", b.BlockSizes, a.BlockSizes)
	case b.Structured != a.Structured || b.Extended != a.Extended:
		what = "it speaks another form of the protocol"
	case !slices.Equal(b.Contexts.names(), a.Contexts.names()):
		what = fmt.Sprintf("its meta contexts are %q, and were %q", b.Contexts.names(), a.Contexts.names())
	default:
		return nil
	}
	return fmt.Errorf("nbd: the server has another export than before: %s", what)
}

// again makes a request that was lost along with k on a connection that is there, or will be. It
// does so as often as it takes, until the time of the policy is up.
func (c *Client) again(ctx context.Context, r *request, k *conn, err error) error {
	until := time.Now().Add(c.options.Reconnect.timeout())
	for err != nil && k.lost(err) {
		if !time.Now().Before(until) {
			return err
		}
		var failed error
		if k, failed = c.await(ctx, until); failed != nil {
			return failed
		}
		err = k.do(ctx, r)
	}
	return err
}

// lost reports whether an error says nothing of a request but that it was lost along with the
// connection. One to a server that is shutting down is, too, but others are not: they are still
// answered ("Terminating the transmission phase").
func (k *conn) lost(err error) bool {
	var refused *RequestError
	if errors.As(err, &refused) && refused.Errno == wire.ErrnoShutdown {
		k.retire()
		return true
	}
	var gone *connError
	return errors.As(err, &gone)
}

// await waits for a connection until then, or until the time of the policy is up for all.
func (c *Client) await(ctx context.Context, until time.Time) (*conn, error) {
	o, patience := &c.outage, c.options.Reconnect.timeout()
	for {
		o.mu.Lock()
		state, changed := o.state, o.changed
		o.mu.Unlock()
		if k := c.conn(); k.alive() {
			return k, nil
		}
		// A connection that was lost just now may not be noted yet. It will be.
		if over := state.Since.Add(patience); !state.Since.IsZero() && over.Before(until) {
			until = over
		}
		left := time.Until(until)
		if left <= 0 {
			if state.Err == nil {
				state.Err = errNoAnswer // It has come and gone all the time.
			}
			return nil, fmt.Errorf("nbd: no connection for %v: %w", patience, state.Err)
		}
		timer := time.NewTimer(left)
		select {
		case <-changed:
		case <-timer.C:
		case <-o.ended:
			timer.Stop()
			return nil, fmt.Errorf("nbd: %w", net.ErrClosed)
		case <-ctx.Done():
			timer.Stop()
			return nil, context.Cause(ctx)
		}
		timer.Stop()
	}
}
