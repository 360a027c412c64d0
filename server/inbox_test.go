package server

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"testing"
	"testing/iotest"
)

// TestInbox reads a stream through an inbox in random portions, from sources that give it in all sorts of pieces, and
// moves on to another inbox now and then.
func TestInbox(t *testing.T) {
	stream := make([]byte, 3*inboxSize)
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
			src := wrap(bytes.NewReader(stream))
			in := &inbox{src: src, buf: make([]byte, inboxSize)}
			var got []byte
			for len(got) < len(stream) {
				left := len(stream) - len(got)
				switch n := min(left, 1+rng.IntN(3000)); rng.IntN(3) {
				case 0:
					b, err := in.peek(min(n, headerSize))
					if err != nil {
						t.Fatalf("peek at %d: %v", len(got), err)
					}
					got = append(got, b...)
					in.skip(len(b))
				case 1:
					p := make([]byte, n)
					if m, err := in.readFull(p); m != n || err != nil {
						t.Fatalf("readFull at %d: %d of %d, %v", len(got), m, n, err)
					}
					got = append(got, p...)
				case 2:
					in = &inbox{src: src, ahead: in.unread(), buf: make([]byte, inboxSize)}
				}
			}
			if !bytes.Equal(got, stream) {
				t.Fatal("the stream came out changed")
			}
			if _, err := in.peek(1); err != io.EOF {
				t.Errorf("at the end: %v, want EOF", err)
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

func TestInboxEnds(t *testing.T) {
	errBoom := errors.New("boom")
	tests := []struct {
		name     string
		has      int
		then     error
		peek     error
		readFull error
	}{
		{"nothing", 0, io.EOF, io.EOF, io.ErrUnexpectedEOF},
		{"too little", headerSize - 1, io.EOF, io.ErrUnexpectedEOF, io.ErrUnexpectedEOF},
		{"broken", headerSize - 1, errBoom, errBoom, errBoom},
	}
	for _, tt := range tests {
		all := bytes.Repeat([]byte{'x'}, tt.has)
		open := func() *inbox {
			return &inbox{src: io.MultiReader(bytes.NewReader(all), iotest.ErrReader(tt.then)), buf: make([]byte, inboxSize)}
		}
		in := open()
		if _, err := in.peek(headerSize); err != tt.peek {
			t.Errorf("%s: peek: %v, want %v", tt.name, err, tt.peek)
		}
		if got := in.unread(); !bytes.Equal(got, all) {
			t.Errorf("%s: after a failed peek %d bytes are left, want %d", tt.name, len(got), len(all))
		}
		if n, err := open().readFull(make([]byte, headerSize)); n != tt.has || err != tt.readFull {
			t.Errorf("%s: readFull: %d, %v, want %d, %v", tt.name, n, err, tt.has, tt.readFull)
		}
	}
}
