package holder

import (
	"context"
	"sync"
)

// walks lets those share a walk who want one at the same time: a walk looks at every descriptor of
// every process, however few devices it is for. Each gets one that began after it asked, and so
// finds whoever was there by then, as a walk of its own would.
type walks struct {
	mu      sync.Mutex // guards what follows
	next    *walk      // that has not begun; nil if nobody wants one
	walking bool
}

// join returns the next walk when it has been taken, for these devices and those of others. It ends
// with ctx; the walk goes on.
func (f *Finder) join(ctx context.Context, indexes ...int) (*walk, error) {
	ws := &f.walks
	ws.mu.Lock()
	if ws.next == nil {
		ws.next = f.newWalk()
	}
	w := ws.next
	w.add(indexes...)
	if !ws.walking {
		ws.walking = true
		go ws.run()
	}
	ws.mu.Unlock()
	select {
	case <-w.done:
		return w, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// run takes walks, one after the other, as long as somebody wants one.
func (ws *walks) run() {
	for w := ws.take(); w != nil; w = ws.take() {
		w.run()
		close(w.done)
	}
}

// take returns the walk that is to begin, which nobody can join any more, or nil.
func (ws *walks) take() *walk {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	w := ws.next
	ws.next = nil
	ws.walking = w != nil
	return w
}
