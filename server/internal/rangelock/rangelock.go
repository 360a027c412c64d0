// Package rangelock keeps requests that change the same bytes in the order in which they came,
// across the connections of an export.
//
// A client with several connections sends a request again over another one when the first does not
// answer in time, as the Linux client does (nbd_xmit_timeout), and the backend may still be at work
// on the old one. Were the two executed side by side, the new one could be answered, newer data be
// written, and the old one end last, on top of them. So what changes bytes waits for what was there
// before it for the same bytes, of another owner. Reads do not, nor does anything of one owner: a
// client that has two writes of the same bytes in flight on a connection does not care which one
// wins. One that was told of a failure does: what has failed so is an orphan, and holds up
// everybody.
package rangelock

import (
	"errors"
	"sync"
	"sync/atomic"
	"time"
)

// ErrAbandoned is the outcome of waiting for a lock that nobody wants any more.
var ErrAbandoned = errors.New("not executed: the client hung up, or was told that it has failed, before its turn came")

// Patience is how long the holder of a partial lock may wait for its client while another owner
// waits for the lock.
const Patience = time.Second

// An Owner is a connection, as far as locks are concerned. What is of one owner does not wait for
// what is of the same.
type Owner struct {
	abandoned func() bool
	hurry     func()

	held   int  // locks, but for orphans; guarded by the mu of the table, like sealed
	sealed bool // gets no lock any more
}

// NewOwner returns an owner. abandoned reports whether what it waits for is not wanted any more:
// who changes the answer calls Wake. hurry has its holder of a partial lock give it up, and is
// called without any lock held. Both must not block.
func NewOwner(abandoned func() bool, hurry func()) *Owner {
	return &Owner{abandoned: abandoned, hurry: hurry}
}

// A Range is some bytes, from First to just before End.
type Range struct{ First, End uint64 }

func (r Range) overlaps(o Range) bool { return r.First < o.End && o.First < r.End }

// A Lock is the range that a request changes, from before the backend sees it until it has let go
// of it. The zero value is none.
type Lock struct {
	owner   *Owner // nil: not in a table
	of      Range
	partial bool // may be given up: what it is for has not all come
	orphan  bool // its client was told that the request has failed
	stuck   bool // another one has failed because of it

	older, newer *Lock
}

// Held reports whether the lock is in a table, as its holder knows.
func (k *Lock) Held() bool { return k.owner != nil }

// A Table has the locks of an export, in the order in which they came. Each waits only for older
// ones, so there is always one that does not. What is in it is bounded by what connections may have
// in flight. The zero value is empty. Safe for concurrent use.
type Table struct {
	count atomic.Int32 // of those in the list; changes under mu

	mu             sync.Mutex // guards all below, the locks in the list, and their owners
	gone           sync.Cond  // a lock, or who wants it
	oldest, newest *Lock
	waiting        int // for their turn
}

// Add puts k in the table, and reports whether it has to wait, which it does not do. For a sealed
// owner there is nothing to wait for: Wait says so.
func (t *Table) Add(k *Lock, o *Owner, of Range) (wait bool) { return t.add(k, o, of, false) }

func (t *Table) add(k *Lock, o *Owner, of Range, partial bool) (wait bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	*k = Lock{owner: o, of: of, partial: partial, older: t.newest}
	if k.older == nil {
		t.oldest = k
	} else {
		k.older.newer = k
	}
	t.newest = k
	o.held++
	t.count.Add(1)
	return o.sealed || t.contested(k)
}

// TryAdd is Add of a partial lock if that would not have to wait, and nothing else.
func (t *Table) TryAdd(k *Lock, o *Owner, of Range) bool {
	if t.add(k, o, of, true) {
		t.Remove(k)
		return false
	}
	return true
}

// Free reports whether nobody but o has a lock on the range. It is for who will be done in no time.
func (t *Table) Free(o *Owner, of Range) bool {
	if t.count.Load() == 0 {
		return true
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return !t.contested(&Lock{owner: o, of: of, older: t.newest})
}

// contested reports whether k has to wait for an older lock. The caller holds mu.
func (t *Table) contested(k *Lock) bool {
	if int(t.count.Load()) == k.owner.held {
		return false
	}
	for o := k.older; o != nil; o = o.older {
		if o.blocks(k) {
			return true
		}
	}
	return false
}

// blocks reports whether k waits for o: it is of another owner, or of nobody any more, and has
// bytes in common with it.
func (o *Lock) blocks(k *Lock) bool { return (o.owner != k.owner || o.orphan) && o.of.overlaps(k.of) }

// Wait returns when it is the turn of k, or ErrAbandoned when nobody wants it any more.
func (t *Table) Wait(k *Lock) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if k.owner.sealed || k.orphan {
		return ErrAbandoned
	}
	if !t.contested(k) {
		return nil
	}
	return t.queue(k)
}

// queue is Wait for a lock whose turn has not come. The caller holds mu.
func (t *Table) queue(k *Lock) error {
	done := false // guarded by mu; k may be another lock then
	timer := time.AfterFunc(Patience, func() { t.hurry(k, &done) })
	defer func() {
		done = true
		timer.Stop()
	}()
	t.gone.L = &t.mu
	for t.contested(k) {
		if k.owner.abandoned() || k.orphan {
			return ErrAbandoned
		}
		t.waiting++
		t.gone.Wait()
		t.waiting--
	}
	return nil
}

// hurry has partial locks given up that k waits for: no peer can make others wait for ever by
// keeping the rest of a payload to itself. done tells that k waits no more.
func (t *Table) hurry(k *Lock, done *bool) {
	var owners []*Owner
	t.mu.Lock()
	if !*done {
		for o := k.older; o != nil; o = o.older {
			if o.partial && o.blocks(k) {
				owners = append(owners, o.owner)
			}
		}
	}
	t.mu.Unlock()
	for _, o := range owners {
		o.hurry()
	}
}

// Remove takes k out of the table, if it is there.
func (t *Table) Remove(k *Lock) {
	if k.owner != nil { // Most writes have none: this is to be inlined.
		t.unlink(k)
	}
}

func (t *Table) unlink(k *Lock) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if k.older == nil {
		t.oldest = k.newer
	} else {
		k.older.newer = k.newer
	}
	if k.newer == nil {
		t.newest = k.older
	} else {
		k.newer.older = k.older
	}
	if !k.orphan {
		k.owner.held--
	}
	t.count.Add(-1)
	k.owner = nil
	if t.waiting > 0 {
		t.gone.Broadcast()
	}
}

// Orphan has k, if it is in the table, hold up whoever comes after it, its own owner included. It
// is for a request whose client was told that it has failed: newer data must not be overwritten by
// it.
func (t *Table) Orphan(k *Lock) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if k.owner == nil || k.orphan {
		return
	}
	for o := k.older; o != nil; o = o.older {
		if o.blocks(k) {
			o.stuck = true
		}
	}
	k.orphan = true
	k.owner.held--
	t.gone.Broadcast()
}

// Stuck returns the ranges because of which requests have failed.
func (t *Table) Stuck() []Range {
	t.mu.Lock()
	defer t.mu.Unlock()
	var all []Range
	for k := t.oldest; k != nil; k = k.newer {
		if k.stuck || k.orphan {
			all = append(all, k.of)
		}
	}
	return all
}

// Seal keeps o from locks that it does not have yet.
func (t *Table) Seal(o *Owner) {
	t.mu.Lock()
	defer t.mu.Unlock()
	o.sealed = true
	t.gone.Broadcast()
}

// Wake has those who wait look again whether they are abandoned.
func (t *Table) Wake() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.gone.Broadcast()
}
