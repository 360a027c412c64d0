package nbdnl_test

import (
	"errors"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/mdlayher/genetlink"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// Traps of servers that are slow or gone, and of the timeouts that are to deal with them.

// elsewhere is an offset that no partition scan reads, in bytes.
const elsewhere = mebi / 2

// Without a timeout, a server that has stopped reading makes DISCONNECT hang, and with it
// everything that goes through generic netlink; with one, the kernel helps itself.
func TestKernelTrap02DisconnectOfHungServer(t *testing.T) {
	for _, timeout := range []time.Duration{0, time.Second} {
		w, k := trapWorld(t)
		s := observe(t)
		cfg := witnessed(s)
		cfg.Size, cfg.Timeout = 16*mebi, timeout
		index := w.connect(cfg)
		f := w.open(index, os.O_RDWR)
		s.stopReading(t)
		written := async(func() error {
			_, err := f.Write(make([]byte, 8*mebi)) // more than a socket holds
			return errors.Join(err, f.Sync(), f.Close())
		})
		// Until the rest finds no room: the sender holds the lock then.
		for last, since := 0, time.Now(); last < 100_000 || time.Since(since) < 200*time.Millisecond; {
			<-time.After(5 * time.Millisecond)
			if now := queued(t, s.ours); now != last {
				last, since = now, time.Now()
			}
		}
		if timeout > 0 {
			disconnected := async(func() error { return w.Drop(t.Context(), index, cfg.Identifier) })
			w.wantDone("disconnect", w.within("disconnect", soon, disconnected))
		} else {
			disconnected := async(func() error {
				_, err := k.command(nbdnltest.Disconnect, index, nil)
				return err
			})
			wantStuck(w, "disconnect", 300*time.Millisecond, disconnected)
			asked := async(askAnything)
			wantStuck(w, "a question about another family", 300*time.Millisecond, asked)
			s.ours.Close()
			w.wantDone("disconnect", w.within("disconnect", soon, disconnected))
			w.wantDone("the question", w.within("the question", soon, asked))
		}
		if err := w.within("write", soon, written); err == nil {
			t.Error("what the server never read counts as written")
		}
		w.wantState(index, nbdnl.StateIdle)
	}
}

// askAnything asks generic netlink something that has nothing to do with nbd.
func askAnything() error {
	conn, err := genetlink.Dial(nil)
	if err != nil {
		return err
	}
	_, err = conn.GetFamily("nlctrl")
	return errors.Join(err, conn.Close())
}

// Without a timeout, a request in flight outlives the server's death for ever.
func TestKernelTrap03NoTimeoutOneConnection(t *testing.T) {
	for _, timeout := range []time.Duration{0, time.Second} {
		w, k := trapWorld(t)
		l := k.listen()
		s := observe(t)
		s.holdAt(elsewhere)
		cfg := witnessed(s)
		cfg.Timeout = timeout
		index := w.connect(cfg)
		f := w.open(index, os.O_RDONLY|syscall.O_DIRECT)
		inFlight := w.read(f, elsewhere)
		w.keeps(s)
		s.ours.Close()
		w.dead(l, index)
		if err := w.within("a new read", soon, w.read(f, 0)); !errors.Is(err, syscall.EIO) {
			t.Errorf("timeout %v: a new read: %v, want EIO", timeout, err)
		}
		if timeout == 0 {
			wantStuck(w, "the read in flight", 3*time.Second, inFlight)
			w.wantState(index, nbdnl.StateLive)
			w.wantDone("disconnect", w.Drop(t.Context(), index, cfg.Identifier))
		}
		if err := w.within("the read in flight", soon, inFlight); !errors.Is(err, syscall.EIO) {
			t.Errorf("timeout %v: the read in flight: %v, want EIO", timeout, err)
		}
	}
}

// With several connections, no timeout is one of 30 seconds, after which a connection is given up;
// with one it is none.
func TestKernelTrap04NoTimeoutSeveralConnections(t *testing.T) {
	w := kernelWorld(t)
	a, b := observe(t), observe(t)
	a.holdAt(elsewhere)
	b.holdAt(elsewhere)
	cfg := witnessed(a, b)
	cfg.Timeout = 0
	index := w.connect(cfg)
	w.wantSetting(index, "queue/io_timeout", "30000", "no timeout is half a minute")
	w.set(index, "queue/io_timeout", "1000") // the test has less patience
	f := w.open(index, os.O_RDONLY|syscall.O_DIRECT)
	read := w.read(f, elsewhere)
	slow, other := a, b
	select {
	case <-a.held:
	case <-b.held:
		slow, other = b, a
	case <-time.After(soon):
		t.Fatal("no request arrives")
	}
	other.holdAt(-1)
	w.wantDone("the read, on the other connection", w.within("the read", soon, read))
	w.wantGone(slow, "it was too slow")

	s := observe(t)
	s.holdAt(elsewhere)
	cfg = witnessed(s)
	cfg.Timeout = 0
	index = w.connect(cfg)
	w.set(index, "queue/io_timeout", "1000")
	f = w.open(index, os.O_RDONLY|syscall.O_DIRECT)
	read = w.read(f, elsewhere)
	r := w.keeps(s)
	wantStuck(w, "the read", 3*time.Second, read)
	w.wantDone("reply", s.reply(r, 0))
	w.wantDone("the read, late", w.within("the read", soon, read))
}

// A timeout that is left out is that of the index's former user.
func TestKernelTrap05TimeoutLeftOut(t *testing.T) {
	w, k := trapWorld(t)
	const file = "queue/io_timeout"
	index := w.idle()
	cfg := witnessed(observe(t))
	cfg.Timeout = 7 * time.Second
	w.connectIndex(index, cfg)
	w.wantSetting(index, file, "7000", "it was asked for")
	w.wantDetached(index, cfg.Identifier)

	w.wantDone("connect", k.connect(index, kernelEnds(observe(t)), number(nbdAttrSize, mebi)))
	w.wantSetting(index, file, "7000", "it was left out")
	k.disconnect(index)
	w.wantState(index, nbdnl.StateIdle)

	cfg = witnessed(observe(t))
	cfg.Timeout = 0
	w.connectIndex(index, cfg)
	w.wantSetting(index, file, "30000", "this package never leaves it out")
	w.wantDetached(index, cfg.Identifier)
}

// A server that answers later than the timeout has lost its connection; one that says in time that
// it can't, has not.
func TestKernelTrap06TimeoutTooShort(t *testing.T) {
	w, k := trapWorld(t)
	l := k.listen()
	s := observe(t)
	s.holdAt(elsewhere)
	cfg := witnessed(s)
	cfg.Timeout = time.Second
	index := w.connect(cfg)
	f := w.open(index, os.O_RDONLY|syscall.O_DIRECT)
	read := w.read(f, elsewhere)
	w.wantDone("reply", s.reply(w.keeps(s), uint32(syscall.EIO)))
	if err := w.within("read", soon, read); !errors.Is(err, syscall.EIO) {
		t.Errorf("read with an error for an answer: %v, want EIO", err)
	}
	w.wantDone("the next read", w.within("read", soon, w.read(f, 0)))

	read = w.read(f, elsewhere)
	late := w.keeps(s)
	w.dead(l, index)
	w.wantGone(s, "it was too slow")
	if err := w.within("read", soon, read); !errors.Is(err, syscall.EIO) {
		t.Errorf("read that was answered too late: %v, want EIO", err)
	}
	if err := s.reply(late, 0); err == nil {
		t.Error("the late answer was taken")
	}
	if err := w.within("read", soon, w.read(f, 0)); !errors.Is(err, syscall.EIO) {
		t.Errorf("read from a device without connections: %v, want EIO", err)
	}
	f.Close()
	// Nothing is left but to remove the device, whose server can't be written to.
	w.wantDone("detach", w.Detach(t.Context(), index, nbdnl.DetachOptions{Identifier: cfg.Identifier, Dead: true}))
	w.wantState(index, nbdnl.StateIdle)
}

// A write that was sent to a server which failed is sent again to the next one: both have it, and
// the old one must not execute it any more.
func TestKernelTrap09WriteSentTwice(t *testing.T) {
	w, k := trapWorld(t)
	l := k.listen()
	old := observe(t)
	old.holdAt(elsewhere)
	cfg := witnessed(old)
	cfg.Timeout, cfg.DeadConnTimeout = time.Second, 30*time.Second
	index := w.connect(cfg)
	f := w.open(index, os.O_WRONLY|syscall.O_DIRECT)
	p := aligned(t, block)
	p[0] = 'x'
	write := async(func() error {
		_, err := f.WriteAt(p, elsewhere)
		return err
	})
	first := w.keeps(old)
	w.dead(l, index)
	next, _, err := w.replaceDead(index, cfg.Identifier)
	w.wantDone("reconfigure", err)
	second := w.keeps(next)
	if second.cookie == first.cookie || second.first != first.first || second.length != first.length {
		t.Errorf("requests are %+v and %+v, want the same under another cookie", first, second)
	}
	if err := old.reply(first, 0); err == nil {
		t.Error("the answer of the old server was taken")
	}
	wantStuck(w, "the write", 0, write)
	w.wantDone("reply", next.reply(second, 0))
	w.wantDone("write", w.within("write", soon, write))
	f.Close()
	w.wantDetached(index, cfg.Identifier)
}
