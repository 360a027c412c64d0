package blockdev

import (
	"context"
	"fmt"
	"time"

	"github.com/nbdctl/nbdctl/server"
)

// begin begins a replacement, as soon as there may be any.
func (cs *connections) begin(ctx context.Context) error {
	for {
		cs.mu.Lock()
		held := cs.held
		if held == nil {
			cs.replacing++
			cs.mu.Unlock()
			return nil
		}
		cs.mu.Unlock()
		select {
		case <-held:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// settle ends a replacement.
func (cs *connections) settle() {
	cs.mu.Lock()
	cs.replacing--
	cs.mu.Unlock()
	select {
	case cs.settled <- struct{}{}:
	default:
	}
}

// keepAsTheyAre has no dead connection replaced until give is called. It waits for those
// replacements that are under way. It is for one caller at a time.
func (cs *connections) keepAsTheyAre(ctx context.Context) (give func(), err error) {
	held := make(chan struct{})
	cs.mu.Lock()
	cs.held = held
	cs.mu.Unlock()
	give = func() {
		cs.mu.Lock()
		defer cs.mu.Unlock()
		cs.held = nil
		close(held)
	}
	for {
		cs.mu.Lock()
		n := cs.replacing
		cs.mu.Unlock()
		if n == 0 {
			return give, nil
		}
		select {
		case <-cs.settled:
		case <-ctx.Done():
			give()
			return nil, fmt.Errorf("connections are being replaced: %w", context.Cause(ctx))
		}
	}
}

// A present is a connection as it is at the moment.
type present struct {
	conn  transmitter
	stats server.Stats
	dead  time.Time // since when it is dead; zero: it is alive
}

// present returns all connections.
func (cs *connections) present() []present {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	all := make([]present, len(cs.all))
	for i, c := range cs.all {
		all[i] = present{conn: c.conn, stats: c.stats()}
		if !c.alive {
			all[i].dead = c.dead
		}
	}
	return all
}

// handOver has the set end without a loss when its connections do, for another process goes on with
// them. Those that are watched end at that.
func (cs *connections) handOver() {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	cs.away.Store(true)
	cs.retire()
	for _, c := range cs.all {
		letGo([]transmitter{c.conn})
	}
}

// handedOver reports whether another process goes on with the connections.
func (cs *connections) handedOver() bool { return cs.away.Load() }

// replacedBefore says how many connections were replaced before any was served here.
func (cs *connections) replacedBefore(n int64) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	cs.replaced = n
}

// servedBefore adds what was served over each connection before.
func (cs *connections) servedBefore(before []server.Stats) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for i, c := range cs.all {
		c.past.Add(&before[i])
	}
}
