package server

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"testing"
	"testing/iotest"

	"github.com/nbdctl/nbdctl/server/internal/rawio"
	"github.com/nbdctl/nbdctl/server/wire"
)

// source is a connection to receive from. Like a real one it may find nothing to receive yet, and
// lets the buffer go then.
type source struct {
	io.Reader
	parks int
}

func (s *source) Recv(l rawio.Lender) (int, error) {
	l.Lend()
	l.Yield(true)
	if s.parks++; s.parks%3 == 0 {
		l.Park(true)
	}
	return s.Read(l.Lend())
}

func (s *source) ReadFull(p []byte, w rawio.Waiter) (int, error) {
	if s.parks++; s.parks%3 == 0 {
		w.Wait()
	}
	n, err := io.ReadFull(s.Reader, p)
	if err == io.ErrUnexpectedEOF {
		err = io.EOF
	}
	return n, err
}

func (s *source) Window() int                        { return 128 << 10 }
func (s *source) Direct() int                        { return largeWrite }
func (s *source) Send(*rawio.Vec, bool) (int, error) { return 0, errors.ErrUnsupported }
func (s *source) SendPages(*rawio.Pages) error       { return errors.ErrUnsupported }
func (s *source) SendsPages() bool                   { return false }

func newInbox(src rawio.Conn, pool *buffers, ahead []byte) *inbox {
	return &inbox{io: src, pool: pool, ahead: ahead, full: src.Window(), window: src.Window(), header: 28}
}

// TestInbox reads a stream through an inbox in random portions, from sources that give it in all
// sorts of pieces, and moves on to another inbox now and then.
func TestInbox(t *testing.T) {
	stream := make([]byte, 200<<10)
	for i := range stream {
		stream[i] = byte(i * 7 >> 3)
	}
	sources := map[string]func(io.Reader) io.Reader{
		"whole":          func(r io.Reader) io.Reader { return r },
		"halves":         iotest.HalfReader,
		"bytes":          iotest.OneByteReader,
		"data with EOF":  iotest.DataErrReader,
		"random lengths": func(r io.Reader) io.Reader { return &chopper{r, rand.New(rand.NewPCG(1, 2))} },
	}
	for name, wrap := range sources {
		t.Run(name, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(3, 4))
			src := &source{Reader: wrap(bytes.NewReader(stream))}
			var pool buffers
			in := newInbox(src, &pool, nil)
			var got []byte
			for len(got) < len(stream) {
				in.expect(&wire.Request{Command: wire.CmdWrite, Length: uint64(rng.IntN(2 * largeWrite))},
					rng.IntN(2) == 0)
				left := len(stream) - len(got)
				switch n := min(left, 1+rng.IntN(3000)); rng.IntN(5) {
				case 0, 1:
					n = min(n, wire.RequestSize)
					for len(in.received()) < n {
						if err := in.receive(); err != nil {
							t.Fatalf("receive at %d: %v", len(got), err)
						}
					}
					got = append(got, in.take(n)...)
				case 2:
					p := make([]byte, n)
					if m, err := in.readFull(p); m != n || err != nil {
						t.Fatalf("readFull at %d: %d of %d, %v", len(got), m, n, err)
					}
					got = append(got, p...)
				case 3:
					n = min(left, n*30)
					if p, err := in.gather(n); p != nil || err != nil {
						t.Fatalf("gather at %d: %d of %d, %v", len(got), len(p), n, err)
					}
					got = append(got, in.take(n)...)
				case 4:
					in = newInbox(src, &pool, in.unread())
				}
			}
			if !bytes.Equal(got, stream) {
				t.Fatal("the stream came out changed")
			}
			if err := in.receive(); err != io.EOF {
				t.Errorf("at the end: %v, want EOF", err)
			}
			if in.release(); in.buf != nil {
				t.Error("an empty inbox keeps its buffer")
			}
		})
	}
}

// chopper returns reads of random lengths.
type chopper struct {
	r   io.Reader
	rng *rand.Rand
}

func (c *chopper) Read(p []byte) (int, error) {
	return c.r.Read(p[:1+c.rng.IntN(len(p))])
}

// TestInboxParks holds which remains of a request cost a waiting connection a buffer, and that none
// is lost either way.
func TestInboxParks(t *testing.T) {
	for _, n := range []int{0, 1, wire.RequestSize - 1, maxStub, maxStub + 1, largeWrite} {
		stream := bytes.Repeat([]byte{'x'}, n)
		var pool buffers
		in := newInbox(&source{}, &pool, stream)
		for len(in.ahead) > 0 {
			if err := in.receive(); err != nil {
				t.Fatal(err)
			}
		}
		if n > 0 && in.ahead != nil {
			t.Error("what was taken over is held on to when it is used up")
		}
		in.Park(true)
		if kept := in.buf != nil; kept != (n > maxStub) {
			t.Errorf("%d bytes left over: buffer kept is %v", n, kept)
		}
		if got := in.unread(); !bytes.Equal(got, stream) {
			t.Errorf("%d bytes left over became %d", n, len(got))
		}
		if room := in.Lend(); len(room) < rawio.MinLend || !bytes.Equal(in.received(), stream) {
			t.Errorf("%d bytes left over: room for %d more, %d kept", n, len(room), len(in.received()))
		}
	}
}

func TestInboxEnds(t *testing.T) {
	errBoom := errors.New("boom")
	tests := []struct {
		name     string
		has      int
		then     error
		receive  error
		readFull error
	}{
		{"nothing", 0, io.EOF, io.EOF, io.ErrUnexpectedEOF},
		{"too little", wire.RequestSize - 1, io.EOF, io.ErrUnexpectedEOF, io.ErrUnexpectedEOF},
		{"broken", wire.RequestSize - 1, errBoom, errBoom, errBoom},
	}
	for _, tt := range tests {
		all := bytes.Repeat([]byte{'x'}, tt.has)
		var pool buffers
		open := func() *inbox {
			return newInbox(&source{Reader: io.MultiReader(bytes.NewReader(all), iotest.ErrReader(tt.then))}, &pool,
				nil)
		}
		in := open()
		var err error
		for err == nil {
			err = in.receive()
		}
		if err != tt.receive {
			t.Errorf("%s: receive: %v, want %v", tt.name, err, tt.receive)
		}
		if got := in.unread(); !bytes.Equal(got, all) {
			t.Errorf("%s: after an error %d bytes are left, want %d", tt.name, len(got), len(all))
		}
		if n, err := open().readFull(make([]byte, wire.RequestSize)); n != tt.has || err != tt.readFull {
			t.Errorf("%s: readFull: %d, %v, want %d, %v", tt.name, n, err, tt.has, tt.readFull)
		}
		in = open()
		if got, err := in.gather(wire.RequestSize); !bytes.Equal(got, all) || err != tt.readFull ||
			len(in.received()) > 0 {
			t.Errorf("%s: gather: %d, %v, %d left, want %d, %v, 0",
				tt.name, len(got), err, len(in.received()), tt.has, tt.readFull)
		}
	}
}
