package blockdev

import (
	"errors"
	"io"
	"testing"

	"github.com/nbdctl/nbdctl/server"
)

// TestLosses holds how losses of all sorts are numbered, acknowledged, and announced.
func TestLosses(t *testing.T) {
	var l losses
	announced := 0
	l.notify = func() { announced++ }
	if l.told(0, true) != nil || l.told(0, false) != nil || l.acknowledge(0) || l.acknowledge(1) {
		t.Error("a loss of nothing")
	}
	first := &server.RequestError{Offset: 1, Err: errors.ErrUnsupported}
	second := &server.RequestError{Offset: 2, Err: io.EOF}
	for _, tt := range []struct {
		what      string
		do        func()
		number    uint64 // of both
		all, open uint64 // requests that have failed
		first     *server.RequestError
		announced int
	}{
		{"a request", func() { l.failed(first) }, 1, 1, 1, first, 1},
		{"another", func() { l.failed(second) }, 2, 2, 2, first, 1},
		{"no connection", func() { l.unsent(io.ErrUnexpectedEOF) }, 3, 2, 2, first, 1},
		{"a sync", func() { l.unwritten(io.ErrNoProgress) }, 4, 2, 2, first, 1},
		{"acknowledged too late", func() { l.acknowledge(3) }, 4, 2, 2, first, 1},
		{"acknowledged", func() { l.acknowledge(4) }, 4, 2, 0, nil, 1},
		{"excused", func() { l.excuse(); l.unsent(io.EOF); l.unwritten(io.EOF) }, 4, 2, 0, nil, 1},
		{"a request after that", func() { l.failed(second) }, 5, 3, 1, second, 2},
	} {
		tt.do()
		all, open := l.told(7, true), l.told(7, false)
		if all.Number != tt.number || all.Failed.Requests != tt.all || all.Failed.First != first {
			t.Errorf("%s: all: %+v", tt.what, all)
		}
		if tt.open == 0 && open != nil || tt.open > 0 && (open.Number != tt.number || open.Failed.Requests != tt.open ||
			open.Failed.First != tt.first) {
			t.Errorf("%s: open: %+v", tt.what, open)
		}
		if l.told(7, true) != all || l.told(7, false) != open {
			t.Errorf("%s: asked again, it is another", tt.what)
		}
		if announced != tt.announced {
			t.Errorf("%s: announced %d times", tt.what, announced)
		}
	}
	all, open := l.told(7, true), l.told(7, false)
	for _, part := range []error{io.ErrUnexpectedEOF, io.ErrNoProgress, errors.ErrUnsupported} {
		if !errors.Is(all, part) || errors.Is(open, part) {
			t.Errorf("%v: in all %t, in what is open %t", part, errors.Is(all, part), errors.Is(open, part))
		}
	}
}
