package buse_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"math/bits"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/backends/buse"
)

func TestSize(t *testing.T) {
	const wide = bits.UintSize == 64
	for _, tt := range []struct {
		size int64
		ok   bool
	}{
		{math.MinInt64, false}, {-1, false}, {0, true}, {1, true}, {math.MaxUint32, true},
		{math.MaxUint32 + 1, wide}, {math.MaxInt64, wide},
	} {
		b, err := buse.New(newDriver(0), tt.size)
		switch {
		case (err == nil) != tt.ok || err != nil && !errors.Is(err, fs.ErrInvalid):
			t.Errorf("size %d: error %v", tt.size, err)
		case tt.ok && b.Size() != tt.size:
			t.Errorf("size %d: Size is %d", tt.size, b.Size())
		}
	}
	if _, err := buse.New(nil, 1); err == nil {
		t.Error("nil was taken for a driver")
	}
}

// A recorder writes down its calls, and answers them with err.
type recorder struct {
	calls []string
	err   error
}

func (r *recorder) note(format string, args ...any) error {
	r.calls = append(r.calls, fmt.Sprintf(format, args...))
	return r.err
}

func (r *recorder) ReadAt(p []byte, off uint) error  { return r.note("read %d at %d", len(p), off) }
func (r *recorder) WriteAt(p []byte, off uint) error { return r.note("write %q at %d", p, off) }
func (r *recorder) Disconnect()                      { r.note("disconnect") }
func (r *recorder) Flush() error                     { return r.note("flush") }
func (r *recorder) Trim(off, length uint) error      { return r.note("trim %d at %d", length, off) }

// both runs a test for a driver of either kind.
func both(t *testing.T, test func(*testing.T, func(buse.Driver, int64) (*buse.Backend, error))) {
	t.Run("New", func(t *testing.T) { test(t, buse.New) })
	t.Run("NewConcurrent", func(t *testing.T) { test(t, buse.NewConcurrent) })
}

func TestCalls(t *testing.T) {
	both(t, func(t *testing.T, open func(buse.Driver, int64) (*buse.Backend, error)) {
		for _, tt := range []struct {
			name string
			call func(*buse.Backend) (int, error)
			n    int
			err  error
			want []string
		}{
			{"read", read(3, 5), 3, nil, []string{"read 3 at 5"}},
			{"read all", read(10, 0), 10, nil, []string{"read 10 at 0"}},
			{"read beyond the end", read(4, 8), 2, io.EOF, []string{"read 2 at 8"}},
			{"read behind the end", read(4, 12), 0, io.EOF, nil},
			{"read nothing", read(0, 3), 0, nil, nil},
			{"read before the start", read(4, -1), 0, errAny, nil},
			{"write", write("abc", 5), 3, nil, []string{`write "abc" at 5`}},
			{"write nothing", write("", 10), 0, nil, nil},
			{"write beyond the end", write("abc", 8), 0, errAny, nil},
			{"write before the start", write("abc", -1), 0, errAny, nil},
			{"trim", trim(4, 6), 0, nil, []string{"trim 6 at 4"}},
			{"trim all", trim(0, 10), 0, nil, []string{"trim 10 at 0"}},
			{"trim nothing", trim(4, 0), 0, nil, nil},
			{"trim beyond the end", trim(4, 7), 0, errAny, nil},
			{"trim a negative length", trim(4, -1), 0, errAny, nil},
			{"sync", func(b *buse.Backend) (int, error) { return 0, b.Sync() }, 0, nil, []string{"flush"}},
		} {
			r := &recorder{}
			b, err := open(r, 10)
			if err != nil {
				t.Fatal(err)
			}
			n, err := tt.call(b)
			if n != tt.n || !errors.Is(err, tt.err) && (tt.err != errAny || err == nil) {
				t.Errorf("%s: %d, %v; want %d, %v", tt.name, n, err, tt.n, tt.err)
			}
			if diff := cmp.Diff(tt.want, r.calls); diff != "" {
				t.Errorf("%s: calls of the driver (-want +got):\n%s", tt.name, diff)
			}
		}
	})
}

var errAny = errors.New("any other error")

func read(n int, off int64) func(*buse.Backend) (int, error) {
	return func(b *buse.Backend) (int, error) { return b.ReadAt(make([]byte, n), off) }
}

func write(s string, off int64) func(*buse.Backend) (int, error) {
	return func(b *buse.Backend) (int, error) { return b.WriteAt([]byte(s), off) }
}

func trim(off, n int64) func(*buse.Backend) (int, error) {
	return func(b *buse.Backend) (int, error) { return 0, b.Trim(off, n) }
}

// requests are one of each.
var requests = map[string]func(*buse.Backend) (int, error){
	"read": read(4, 0), "write": write("data", 0), "trim": trim(0, 4),
	"sync": func(b *buse.Backend) (int, error) { return 0, b.Sync() },
}

// TestErrors holds that the error of a driver arrives as it is, with nothing done.
func TestErrors(t *testing.T) {
	both(t, func(t *testing.T, open func(buse.Driver, int64) (*buse.Backend, error)) {
		r := &recorder{err: errors.New("of the driver")}
		b, err := open(r, 10)
		if err != nil {
			t.Fatal(err)
		}
		for name, request := range requests {
			if n, err := request(b); n != 0 || err != r.err {
				t.Errorf("%s: %d, %v; want the error of the driver alone", name, n, err)
			}
		}
	})
}

func TestClose(t *testing.T) {
	both(t, func(t *testing.T, open func(buse.Driver, int64) (*buse.Backend, error)) {
		r := &recorder{}
		b, err := open(r, 10)
		if err != nil {
			t.Fatal(err)
		}
		if err := b.Close(); err != nil {
			t.Error(err)
		}
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				if err := b.Close(); !errors.Is(err, fs.ErrClosed) {
					t.Errorf("second Close: %v", err)
				}
			})
		}
		wg.Wait()
		for name, request := range requests {
			if _, err := request(b); !errors.Is(err, fs.ErrClosed) {
				t.Errorf("%s after Close: %v", name, err)
			}
		}
		if diff := cmp.Diff([]string{"disconnect"}, r.calls); diff != "" {
			t.Errorf("calls of the driver (-want +got):\n%s", diff)
		}
	})
}

// A crowd is a driver that counts who is in it.
type crowd struct {
	inside, most, calls int // without a lock, so that the race detector looks, too
}

func (c *crowd) visit() error {
	c.inside++
	c.most = max(c.most, c.inside)
	c.calls++
	runtime.Gosched()
	c.inside--
	return nil
}

func (c *crowd) ReadAt(p []byte, off uint) error  { return c.visit() }
func (c *crowd) WriteAt(p []byte, off uint) error { return c.visit() }
func (c *crowd) Disconnect()                      { c.visit() }
func (c *crowd) Flush() error                     { return c.visit() }
func (c *crowd) Trim(off, length uint) error      { return c.visit() }

func TestSerial(t *testing.T) {
	const users, rounds = 4, 200
	c := &crowd{}
	b, err := buse.New(c, 10)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range users {
		for name, request := range requests {
			wg.Go(func() {
				for range rounds {
					if _, err := request(b); err != nil {
						t.Errorf("%s: %v", name, err)
					}
				}
			})
		}
	}
	wg.Wait()
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	if want := users*rounds*len(requests) + 1; c.most != 1 || c.calls != want {
		t.Errorf("%d calls, up to %d at a time; want %d, one at a time", c.calls, c.most, want)
	}
}

// A meeting is a driver whose reads wait for a write.
type meeting struct {
	recorder
	met chan []byte
}

func (m *meeting) ReadAt(p []byte, off uint) error {
	select {
	case data := <-m.met:
		copy(p, data)
		return nil
	case <-time.After(time.Minute):
		return errors.New("nobody came")
	}
}

func (m *meeting) WriteAt(p []byte, off uint) error {
	m.met <- bytes.Clone(p)
	return nil
}

func TestConcurrent(t *testing.T) {
	b, err := buse.NewConcurrent(&meeting{met: make(chan []byte)}, 10)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		if _, err := b.WriteAt([]byte("hello"), 0); err != nil {
			t.Error(err)
		}
	})
	p := make([]byte, 5)
	if _, err := b.ReadAt(p, 0); err != nil || string(p) != "hello" {
		t.Errorf("read %q, %v", p, err)
	}
}

// A panicker is a driver that panics in its reads.
type panicker struct{ recorder }

func (p *panicker) ReadAt([]byte, uint) error { panic("out of order") }

// TestPanic holds that a panic reaches the caller, and that the next call has its turn.
func TestPanic(t *testing.T) {
	b, err := buse.New(&panicker{}, 10)
	if err != nil {
		t.Fatal(err)
	}
	func() {
		defer func() {
			if recover() == nil {
				t.Error("the panic of the driver is lost")
			}
		}()
		b.ReadAt(make([]byte, 1), 0)
	}()
	if err := errors.Join(b.Sync(), b.Close()); err != nil {
		t.Error(err)
	}
}
