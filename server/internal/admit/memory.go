package admit

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Clients can hold memory for as long as they like, by not taking a reply or by not sending the
// data of a write. Two rules keep that from others:
//
// Each client has a share of its own, which nobody else can take. A client whose requests fit in
// there never waits for others, however many of them hold all that they can get.
//
// The rest goes first come first served to what does not fit. As long as anybody waits for some of
// it, time is told in turns: a turn is over when somebody has been the first of those who wait for
// all of it. A client that makes the server wait for patience turns, and holds more than its share,
// is stalled. While what others hold goes round, all may be as slow as they like. A stop of the
// whole process is one turn at most, however long it takes.
const (
	turn     = 5 * time.Second
	patience = 4
)

// A Memory limits the memory for data of the requests of several clients together, in bytes. It is
// given to requests. One that has some never waits for more, so that all get it as long as backends
// and clients do their part, and clients take replies while they send. Safe for concurrent use.
type Memory struct {
	rest  int64 // for what does not fit in a share, in bytes
	share int64 // that each client has for itself, in bytes
	turn  atomic.Int64

	mu       sync.Mutex // guards all below, and what each account holds
	used     int64      // of rest
	queue    []*waiter
	timing   bool // next is going to be called
	accounts map[*Account]struct{}
}

// A waiter waits for memory.
type waiter struct {
	account *Account
	bytes   int64
	done    chan struct{} // closed when granted is valid
	granted bool
	seen    bool // as the first, a turn ago
}

// An Account is what one client holds of a Memory. One goroutine at a time takes, any may give
// back.
type Account struct {
	memory  *Memory
	stalled func()

	held   int64 // guarded by the mu of memory, and the two below
	closed bool
	told   bool // stalled was called

	mu        sync.Mutex // guards all below, and the tickets; taken last
	receiving int64      // turn in which the server began to wait for data of the client; 0: it does not
	// The replies that the client has not taken, in the order in which they were ready.
	oldest, newest *Ticket
}

// A Ticket is a reply that holds memory, from when it is ready until the client has taken it. The
// zero value is none.
type Ticket struct {
	account      *Account // nil: none
	ready        int64    // turn in which it was
	older, newer *Ticket
}

// NewMemory returns a limit of max bytes for up to that many clients. Half of it is theirs in equal
// shares, the other half for requests that do not fit in one.
func NewMemory(max int64, clients int) *Memory {
	share := max / 2 / int64(clients)
	m := &Memory{rest: max - share*int64(clients), share: share, accounts: make(map[*Account]struct{})}
	m.turn.Store(1) // 0 is never
	return m
}

// Open returns the account of a client, to be closed when the client has gone. stalled is called at
// most once, on a goroutine of its own, when others have waited for long because the client makes
// the server wait: it is to disconnect the client.
func (m *Memory) Open(stalled func()) *Account {
	a := &Account{memory: m, stalled: stalled}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.accounts[a] = struct{}{}
	return a
}

// TryTake takes bytes if the client's share has them, or the rest does and nobody waits for it.
func (a *Account) TryTake(bytes int64) bool {
	m := a.memory
	m.mu.Lock()
	defer m.mu.Unlock()
	if a.held+bytes > m.share && len(m.queue) > 0 {
		return false
	}
	return m.admit(a, bytes)
}

// Take waits for bytes, and reports whether it has got them: not if the account is closed before.
func (a *Account) Take(bytes int64) bool {
	m := a.memory
	w := &waiter{account: a, bytes: bytes, done: make(chan struct{})}
	m.mu.Lock()
	if a.closed {
		m.mu.Unlock()
		return false
	}
	m.queue = append(m.queue, w)
	m.grant()
	if len(m.queue) > 0 && !m.timing {
		m.timing = true
		time.AfterFunc(turn, m.next)
	}
	m.mu.Unlock()
	<-w.done
	return w.granted
}

// GiveBack gives back what was taken.
func (a *Account) GiveBack(bytes int64) {
	m := a.memory
	m.mu.Lock()
	defer m.mu.Unlock()
	m.used -= m.beyond(a.held) - m.beyond(a.held-bytes)
	a.held -= bytes
	m.grant()
}

// Close has the client wait no more, now or later. What it holds is still to be given back.
func (a *Account) Close() {
	m := a.memory
	m.mu.Lock()
	defer m.mu.Unlock()
	a.closed = true
	delete(m.accounts, a)
	m.queue = slices.DeleteFunc(m.queue, func(w *waiter) bool {
		if w.account == a {
			close(w.done)
		}
		return w.account == a
	})
	m.grant()
}

// Receiving notes that from now on the server waits for data that the client has announced;
// Received, that it does not any more.
func (a *Account) Receiving() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.receiving = a.memory.turn.Load()
}

// Received ends what Receiving has begun.
func (a *Account) Received() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.receiving = 0
}

// Ready notes that t is ready, and waits for the client to take it.
func (a *Account) Ready(t *Ticket) {
	a.mu.Lock()
	defer a.mu.Unlock()
	*t = Ticket{account: a, ready: a.memory.turn.Load(), older: a.newest}
	if t.older == nil {
		a.oldest = t
	} else {
		t.older.newer = t
	}
	a.newest = t
}

// Taken notes that the client has taken t, if it was ready.
func (t *Ticket) Taken() {
	a := t.account
	if a == nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if t.older == nil {
		a.oldest = t.newer
	} else {
		t.older.newer = t.newer
	}
	if t.newer == nil {
		a.newest = t.older
	} else {
		t.newer.older = t.older
	}
	*t = Ticket{}
}

// beyond returns how much of what a client holds does not fit in its share.
func (m *Memory) beyond(held int64) int64 { return max(0, held-m.share) }

// admit takes bytes if there is room. What is more than there is of the rest goes alone. The caller
// holds mu.
func (m *Memory) admit(a *Account, bytes int64) bool {
	more := m.beyond(a.held+bytes) - m.beyond(a.held)
	if more > 0 && m.used > 0 && m.used+more > m.rest {
		return false
	}
	m.used += more
	a.held += bytes
	return true
}

// grant gives to those who have waited for longest. The caller holds mu.
func (m *Memory) grant() {
	n := 0
	for ; n < len(m.queue) && m.admit(m.queue[n].account, m.queue[n].bytes); n++ {
		m.queue[n].granted = true
		close(m.queue[n].done)
	}
	m.queue = slices.Delete(m.queue, 0, n)
}

// next ends a turn if somebody was the first of the queue for all of it, and looks for those who
// stall, as long as anybody waits.
func (m *Memory) next() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.timing = len(m.queue) > 0
	if !m.timing {
		return
	}
	if first := m.queue[0]; !first.seen {
		first.seen = true
	} else {
		m.turn.Add(1)
		for a := range m.accounts {
			if m.stalls(a) && !a.told {
				a.told = true
				go a.stalled()
			}
		}
	}
	time.AfterFunc(turn, m.next)
}

// stalls reports whether a holds what others could have, and makes the server wait for long. The
// caller holds mu.
func (m *Memory) stalls(a *Account) bool {
	if a.held <= m.share {
		return false
	}
	since := m.turn.Load() - patience
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.receiving != 0 && a.receiving <= since || a.oldest != nil && a.oldest.ready <= since
}
