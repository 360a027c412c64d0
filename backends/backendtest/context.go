package backendtest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"time"
)

// contextPatience is how long a call may go on when its context has ended. It
// covers what cannot be given up, as a read of a local disk.
const contextPatience = 5 * time.Second

// checkReadContext holds that reads with a context are reads, and end with it.
func checkReadContext(s *subject) {
	b := s.dev.ReadContext
	for range s.opts.Operations / 10 {
		off, n := s.random(s.rng, 0, s.size/s.unit*s.unit, s.most)
		p := make([]byte, n)
		got, err := b.ReadAtContext(context.Background(), p, off)
		if !s.complete("ReadAtContext", off, n, got, err) {
			return
		}
		if want := s.read(off, n); want != nil && !bytes.Equal(p, want) {
			s.Errorf("ReadAtContext of %d bytes at %d gives other bytes than ReadAt", n, off)
			return
		}
	}
	off, n := int64(0), s.unit
	want := s.read(off, n)
	s.givesUp("ReadAtContext", func(ctx context.Context) {
		p := make([]byte, n)
		got, err := b.ReadAtContext(ctx, p, off)
		switch {
		case int64(got) == n && (err == nil || errors.Is(err, io.EOF)):
			if !bytes.Equal(p, want) {
				s.Errorf("ReadAtContext succeeds with other bytes than ReadAt when its context has ended")
			}
		case err == nil:
			s.Errorf("ReadAtContext: %d of %d bytes and no error when its context has ended", got, n)
		}
	})
}

// checkWriteContext holds that writes with a context are writes, end with it,
// and change nothing afterwards.
func checkWriteContext(s *subject) {
	b := s.dev.WriteContext
	write := func(p []byte, off int64) (int, error) { return b.WriteAtContext(context.Background(), p, off) }
	for range s.opts.Operations / 10 {
		off, n := s.random(s.rng, 0, s.size/s.unit*s.unit, s.most)
		p := fill(s.rng, n)
		if !s.writeWith("WriteAtContext", write, off, p) {
			return
		}
		if got := s.read(off, n); got != nil && !bytes.Equal(got, p) {
			s.Errorf("ReadAt of %d bytes at %d gives other bytes than WriteAtContext has written", n, off)
			return
		}
	}
	old, newer := fill(s.rng, s.unit), fill(s.rng, s.unit)
	s.givesUp("WriteAtContext", func(ctx context.Context) {
		n, err := b.WriteAtContext(ctx, bytes.Clone(old), 0)
		if n != len(old) && err == nil {
			s.Errorf("WriteAtContext: %d of %d bytes and no error when its context has ended", n, len(old))
		}
	})
	s.write(0, newer)
	if got := s.read(0, s.unit); got != nil && !bytes.Equal(got, newer) {
		s.Errorf("a write changes bytes after it was given up")
	}
}

// givesUp makes calls whose context ends before they begin, and while they are
// at work, and fails the test if they do not return.
func (s *subject) givesUp(op string, call func(context.Context)) {
	s.Helper()
	release := func() {}
	if s.opts.Stall != nil {
		release = s.opts.Stall(s.TB, s.dev.Backend)
	}
	defer release()
	ctx, cancel := context.WithCancel(context.Background())
	const calls = 4
	returned := make(chan struct{}, 2*calls)
	start := func() {
		for range calls {
			go func() {
				defer func() { returned <- struct{}{} }()
				call(ctx)
			}()
		}
	}
	start()
	cancel()
	start()
	limit := time.NewTimer(contextPatience)
	defer limit.Stop()
	for range 2 * calls {
		select {
		case <-returned:
		case <-limit.C:
			s.Errorf("%s does not return when its context has ended", op)
			return
		}
	}
}
