package blocksize

import (
	"context"
	"sync"
)

const (
	// bounceSize is the length of a bounce in bytes, unless the inner backend needs more or takes
	// less: more than most requests.
	bounceSize = 256 << 10
	// maxBounces is how many are lent at most; who needs one more waits.
	maxBounces = 32
)

// A bounce is memory for whole blocks.
type bounce struct{ p []byte }

// bounces are lent, each to one request.
type bounces struct {
	size int64         // of each, in bytes; a multiple of the unit
	lent chan struct{} // has an element for each that is lent
	idle sync.Pool     // of *bounce
}

func (b *bounces) init(size int64) {
	b.size = size
	b.lent = make(chan struct{}, maxBounces)
	b.idle.New = func() any { return &bounce{make([]byte, size)} }
}

func (b *bounces) borrow(ctx context.Context) (*bounce, error) {
	select {
	case b.lent <- struct{}{}:
		return b.idle.Get().(*bounce), nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (b *bounces) giveBack(m *bounce) {
	b.idle.Put(m)
	<-b.lent
}
