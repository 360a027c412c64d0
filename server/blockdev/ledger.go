package blockdev

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
)

const (
	// slotSize is that of a cache line, in bytes: connections do not slow each other down.
	slotSize = 64
	// maxSlots bounds the slots of a ledger: one for each connection, and as many again for those
	// that were replaced and left behind.
	maxSlots = 2 * maxConnections
	// minSlots is a page of them.
	minSlots = 64
)

// A slot is what outlives the process of one connection. It is the connection's alone, until
// nothing of it is left here: its workers may end long after another one has taken its place.
type slot struct {
	// begun is 0 while the connection stands still (server.Conn.SetLedger).
	begun atomic.Uint32
	_     uint32
	// use is the connection's alone in all of time; 0: the slot is nobody's.
	use atomic.Uint64
	_   [slotSize - 16]byte
}

// A ledger has the slots of a device's connections, in a file in memory that others keep when the
// process dies. Safe for concurrent use.
type ledger struct {
	file  *os.File
	slots []slot // the file
	unmap func() error

	mu     sync.Mutex // guards all below
	taken  []bool     // of the slots
	count  int        // of those
	closed bool
}

// An entry is a connection's slot of a ledger. The nil entry is that of a connection without one.
type entry struct {
	ledger *ledger
	number int    // of the slot
	use    uint64 // of the slot
	ended  bool   // guarded by the mu of ledger
}

// newLedger makes a ledger for a device with so many connections.
func newLedger(connections int) (*ledger, error) {
	n := max(minSlots, min(2*connections, maxSlots))
	l := &ledger{taken: make([]bool, n)}
	var err error
	if l.file, l.slots, l.unmap, err = makeSlots(n); err != nil {
		return nil, fmt.Errorf("blockdev: memory for what outlives the process (Options.Recoverable): %w", err)
	}
	return l, nil
}

// enter returns a slot for a connection, or nil if none is left.
func (l *ledger) enter() *entry {
	if l == nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, taken := range l.taken {
		if taken || l.closed {
			continue
		}
		l.taken[i] = true
		l.count++
		e := &entry{ledger: l, number: i, use: 1 + rand.Uint64N(1<<63)}
		// Whoever finds the new use must not find what the old one has left.
		l.slots[i].begun.Store(1)
		l.slots[i].use.Store(e.use)
		return e
	}
	return nil
}

// word is what the connection keeps account in.
func (e *entry) word() *atomic.Uint32 { return &e.ledger.slots[e.number].begun }

// end gives the slot back, of a connection of which nothing is left. Further calls do nothing.
func (e *entry) end() {
	if e == nil {
		return
	}
	l := e.ledger
	l.mu.Lock()
	defer l.mu.Unlock()
	if e.ended {
		return
	}
	e.ended = true
	l.slots[e.number].use.Store(0)
	l.taken[e.number] = false
	if l.count--; l.count == 0 && l.closed {
		_ = l.unmap()
	}
}

// close gives the memory back, as soon as no connection uses it any more.
func (l *ledger) close() error {
	if l == nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	l.closed = true
	var err error
	if l.count == 0 {
		err = l.unmap()
	}
	return errors.Join(err, l.file.Close())
}

// copy returns another descriptor of the file.
func (l *ledger) copy() (*os.File, error) { return copyFile(l.file) }

// A record is a slot that another process has left.
type record struct {
	file *os.File
	off  int64
	use  uint64
}

// recordOf returns the record of a connection; nil: it has none.
func recordOf(f *os.File, c HandedConnection) *record {
	if c.Use == 0 {
		return nil
	}
	return &record{file: f, off: int64(c.Slot) * slotSize, use: c.Use}
}

// still reports whether the connection stood still when its process died.
func (r *record) still() (bool, error) {
	if r == nil {
		return false, nil
	}
	var p [16]byte
	if _, err := r.file.ReadAt(p[:], r.off); err != nil {
		return false, fmt.Errorf("what its process has left of it can't be read: %w", err)
	}
	begun, use := binary.NativeEndian.Uint32(p[:]), binary.NativeEndian.Uint64(p[8:])
	return begun == 0 && use == r.use, nil
}

// spend has the connection stand still no more for anybody who reads the record.
func (r *record) spend() error {
	if r == nil {
		return nil
	}
	var p [16]byte
	binary.NativeEndian.PutUint32(p[:], 1)
	_, err := r.file.WriteAt(p[:], r.off)
	return err
}
