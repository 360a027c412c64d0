package nbd_test

import (
	"bytes"
	"context"
	"net"
	"runtime/metrics"
	"sync"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/nbd"
)

// A tape is a connection to a server that says what is on it, whatever it hears, and then hangs up.
type tape struct {
	net.Conn // nil: nothing else is asked for

	says  *bytes.Reader
	heard chan int      // has the length of what was said to the server, if there is room
	begin chan struct{} // closed: it may speak
	ended chan struct{} // closed by Close
	once  sync.Once
}

func newTape(says []byte) *tape {
	return &tape{
		says: bytes.NewReader(says), heard: make(chan int, 100),
		begin: make(chan struct{}), ended: make(chan struct{}),
	}
}

func (t *tape) Read(p []byte) (int, error) {
	select {
	case <-t.begin:
		return t.says.Read(p)
	case <-t.ended:
		return 0, net.ErrClosed
	}
}

func (t *tape) Write(p []byte) (int, error) {
	select {
	case <-t.ended:
		return 0, net.ErrClosed
	case t.heard <- len(p):
	default:
	}
	return len(p), nil
}

func (t *tape) Close() error {
	t.once.Do(func() { close(t.ended) })
	return nil
}

func (t *tape) SetDeadline(time.Time) error      { return nil }
func (t *tape) SetReadDeadline(time.Time) error  { return nil }
func (t *tape) SetWriteDeadline(time.Time) error { return nil }

// inTime fails the test unless f returns.
func inTime(t *testing.T, what string, f func()) {
	t.Helper()
	returned := make(chan struct{})
	go func() {
		defer close(returned)
		f()
	}()
	select {
	case <-returned:
	case <-time.After(20 * time.Second):
		t.Fatalf("%s does not return", what)
	}
}

// heap returns how many bytes were allocated so far. Of small pieces, the latest may be missing.
func heap() uint64 {
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}

// FuzzHandshakeClient holds that no server, whatever it says in a negotiation, makes a client
// panic, hang, take much memory, or believe in an export that there can't be.
func FuzzHandshakeClient(f *testing.F) {
	said := func(turns []turn) []byte {
		var b []byte
		for _, turn := range turns {
			b = append(b, turn.says...)
		}
		return b
	}
	for _, d := range dialogues {
		b := said(d.turns)
		f.Add(byte(0), b)
		f.Add(byte(1), b)
		f.Add(byte(0), b[:len(b)-1])
		f.Add(byte(0), cat(b, magicSimple, u32(0), u64(1<<16), pattern(0, 512)))
		f.Add(byte(0), cat(b, magicStructured, done, chunkHole, u64(1<<16), u32(12), u64(0), u32(512)))
	}
	for _, r := range refusals {
		f.Add(byte(0), said(greeted(turn{nil, answer(optExtended, r.number, "no")},
			turn{nil, answer(optStructured, r.number)},
			hasGo)))
		f.Add(byte(0), said(greeted(hasExtended, turn{nil, answer(optSetContexts, r.number)},
			turn{nil, answer(optGo, r.number)},
			hasExportName)))
	}
	f.Add(byte(2), said(greeted(
		turn{nil, cat(answer(optList, repServer, str("disk"), "a disk"), answer(optList, repAck))},
		turn{nil, cat(sized(optInfo, 1<<20, 0xffff), answer(optInfo, repInfo, infoName, "disk"),
			answer(optInfo, repAck))},
		turn{nil, cat(answer(optListContexts, repContext, u32(0), "base:allocation"), answer(optListContexts, repAck))},
		hasStructured, hasAllocation, hasNoExtended, hasGo)))
	f.Add(byte(0), cat("NBDMAGIC", u64(0x00420281861253), u64(1<<20), u32(0x10001), make([]byte, 124)))
	f.Add(byte(0), cat(greeting(3), magicAnswer, optExtended, repAck, u32(0xffffffff)))
	f.Add(byte(0), cat(said(greeted(hasExtended, hasAllocation)), sized(optGo, 1<<63, 1), answer(optGo, repAck)))
	f.Fuzz(func(t *testing.T, how byte, says []byte) {
		before := heap()
		nc := newTape(says)
		close(nc.begin)
		inTime(t, "the negotiation", func() {
			switch how % 3 {
			case 0:
				negotiateAll(t, nc, nbd.Options{MaxInFlight: 4, Contexts: []string{dirty}})
			case 1:
				negotiateAll(t, nc, nbd.Options{MaxInFlight: 4, NoExtended: true})
			case 2:
				askAll(t, nc)
			}
		})
		if n, most := heap()-before, uint64(2<<20+64*len(says)); n > most {
			t.Errorf("%d bytes take %d of the heap, want %d at most", len(says), n, most)
		}
		select {
		case <-nc.ended:
		default:
			t.Error("the connection is open")
		}
	})
}

// negotiateAll has a client negotiate, and use what it has agreed on.
func negotiateAll(t *testing.T, nc net.Conn, o nbd.Options) {
	c, err := nbd.New(context.Background(), nc, "disk", o)
	if err != nil {
		return
	}
	checkAgreement(t, c.Agreement())
	p := make([]byte, 512)
	c.ReadAt(p, 0)
	c.Extents(0, c.Size(), func(e backends.Extent) bool {
		if e.Length <= 0 || e.Offset < 0 || e.Offset > c.Size()-e.Length {
			t.Errorf("extent %+v of %d bytes", e, c.Size())
		}
		return true
	})
	c.Close()
}

// checkAgreement fails the test if something was agreed on that makes no sense.
func checkAgreement(t *testing.T, a nbd.Agreement) {
	b := a.BlockSizes
	if a.Size < 0 || a.Flags&1 == 0 || a.Extended && !a.Structured || !a.Structured && a.Contexts != nil || a.TLS ||
		b.Minimum&(b.Minimum-1) != 0 || b.Minimum > 65536 || b.Maximum < b.Minimum || b.Preferred < b.Minimum {
		t.Errorf("agreed on %+v", a)
	}
	seen := make(map[uint32]bool)
	for _, c := range a.Contexts {
		if c.Name != "base:allocation" && c.Name != dirty || seen[c.ID] {
			t.Errorf("contexts %+v", a.Contexts)
		}
		seen[c.ID] = true
	}
}

// askAll asks a server all that can be asked, until it has had enough.
func askAll(t *testing.T, nc net.Conn) {
	defer nc.Close()
	ctx := context.Background()
	h, err := nbd.Greet(ctx, nc)
	if err != nil {
		return
	}
	defer h.Close()
	h.List(ctx)
	h.Info(ctx, "disk")
	h.ListContexts(ctx, "disk")
	h.StructuredReplies(ctx)
	h.SetContexts(ctx, "disk", "base:allocation")
	h.ExtendedHeaders(ctx)
	s, err := h.Go(ctx, "disk")
	if err == nil {
		checkAgreement(t, s.Agreement)
	}
}
