package backends_test

import (
	"fmt"
	"log"
	"sync"

	"github.com/nbdctl/nbdctl/backends"
)

const trackedBlock = 64 << 10

// A Tracker remembers which blocks were written, and tells clients: nbdinfo
// --map=x-example:changed has them, and a backup copies no others.
type Tracker struct {
	data []byte

	mu      sync.Mutex // guards changed
	changed map[int64]bool
}

func (t *Tracker) Size() int64 { return int64(len(t.data)) }

func (t *Tracker) ReadAt(p []byte, off int64) (int, error) { return copy(p, t.data[off:]), nil }

func (t *Tracker) WriteAt(p []byte, off int64) (int, error) {
	t.mu.Lock()
	for at := off; at < off+int64(len(p)); at += trackedBlock - at%trackedBlock {
		t.changed[at/trackedBlock] = true
	}
	t.mu.Unlock()
	return copy(t.data[off:], p), nil
}

func (t *Tracker) Contexts() []backends.Context {
	return []backends.Context{{Name: "x-example:changed"}}
}

func (t *Tracker) ContextExtents(_ string, off, n int64, yield func(backends.Mark) bool) error {
	for end := off + n; off < end; {
		m := backends.Mark{Offset: off, Length: min(end, off+trackedBlock-off%trackedBlock) - off}
		t.mu.Lock()
		if t.changed[off/trackedBlock] {
			m.Flags = 1
		}
		t.mu.Unlock()
		if !yield(m) {
			break
		}
		off += m.Length
	}
	return nil
}

// A backend that tells which blocks have changed.
func ExampleContexter() {
	t := &Tracker{data: make([]byte, 256<<10), changed: make(map[int64]bool)}
	if _, err := t.WriteAt([]byte("new"), 100_000); err != nil {
		log.Fatal(err)
	}
	for _, c := range t.Contexts() {
		err := t.ContextExtents(c.Name, 0, t.Size(), func(m backends.Mark) bool {
			fmt.Println(c.Name, m.Offset, m.Length, m.Flags)
			return true
		})
		if err != nil {
			log.Fatal(err)
		}
	}
	// Output:
	// x-example:changed 0 65536 0
	// x-example:changed 65536 65536 1
	// x-example:changed 131072 65536 0
	// x-example:changed 196608 65536 0
}
