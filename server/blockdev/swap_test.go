package blockdev

import (
	"context"
	"errors"
	"io"
	"sync/atomic"
	"testing"
	"time"
)

// A lazy backend takes its time for the first sync, and none for the others.
type lazy struct {
	*elastic
	syncs   atomic.Int64
	arrived chan struct{} // closed when the first sync has begun
	release chan struct{} // ends it
}

func (l *lazy) Sync() error {
	if l.syncs.Add(1) == 1 {
		close(l.arrived)
		<-l.release
	}
	return nil
}

// TestSwapSyncsAhead holds that the first sync of the old backend may take longer than requests may
// wait for a swap, since they need not wait for it, and that the context bounds it.
func TestSwapSyncsAhead(t *testing.T) {
	b := &lazy{elastic: newElastic(), arrived: make(chan struct{}), release: make(chan struct{})}
	k, d, kernel := manual(t, b, Options{})
	d.conns.mu.Lock()
	d.conns.timeout = time.Second
	d.conns.mu.Unlock()
	swapped := make(chan error, 1)
	next := newElastic()
	go func() { swapped <- d.Swap(t.Context(), next) }()
	<-b.arrived
	<-time.After(d.Timeout()) // which is twice as long as a swap may take
	kernel.Write(readRequest(0))
	if _, err := io.ReadFull(kernel, make([]byte, 16+512)); err != nil {
		t.Errorf("a request during the first sync: %v", err)
	}
	select {
	case err := <-swapped:
		t.Fatalf("ended during the first sync: %v", err)
	default:
	}
	close(b.release)
	if err := <-swapped; err != nil || b.syncs.Load() < 2 {
		t.Errorf("error %v, %d syncs, want one that covers what was written since the first", err, b.syncs.Load())
	}

	back := &lazy{elastic: newElastic(), arrived: make(chan struct{}), release: make(chan struct{})}
	defer close(back.release)
	if err := d.Swap(t.Context(), back); err != nil {
		t.Fatal(err)
	}
	cause := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	go func() {
		<-back.arrived
		cancel(cause)
	}()
	if err := d.Swap(ctx, next); !errors.Is(err, cause) || d.backend.Backend != any(back) {
		t.Errorf("error %v, want %v, and the backend that it had", err, cause)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	checkClean(t, k)
}
