package nbdnl

import (
	"sync"
)

// maxNotices bounds the devices that are noted one by one; with more, all are to be looked at.
const maxNotices = 1024

// A notebook collects what the kernel says of devices until somebody looks at them. Its methods may
// be called concurrently.
type notebook struct {
	wake chan struct{} // has an element when there is something new

	mu    sync.Mutex // guards notes
	notes notes
}

// notes are the devices that the kernel has spoken of.
type notes struct {
	all     bool         // any device may have changed
	added   bool         // some were added
	changed map[int]bool // these have
	dead    map[int]bool // connections of these have died
}

func newNotebook() *notebook { return &notebook{wake: make(chan struct{}, 1)} }

// change notes that a device may have changed, or was added.
func (b *notebook) change(index int, added bool) {
	b.note(func(n *notes) {
		n.added = n.added || added
		if n.all = n.all || len(n.changed) >= maxNotices; n.all {
			n.changed = nil
			return
		}
		set(&n.changed, index)
	})
}

// changeAll notes that any device may have changed.
func (b *notebook) changeAll() { b.note(func(n *notes) { n.all, n.changed = true, nil }) }

// death notes that connections of a device have died. Indexes are limited, and so are these notes.
func (b *notebook) death(index int) { b.note(func(n *notes) { set(&n.dead, index) }) }

func (b *notebook) note(f func(*notes)) {
	b.mu.Lock()
	f(&b.notes)
	b.mu.Unlock()
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

// take returns what is noted and forgets it.
func (b *notebook) take() notes {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := b.notes
	b.notes = notes{}
	return n
}

func set(m *map[int]bool, index int) {
	if *m == nil {
		*m = make(map[int]bool)
	}
	(*m)[index] = true
}
