package blockdev

import (
	"errors"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// TestHandOverRemoteKept holds that a handover which comes to nothing has touched nothing, and that
// a connection which was lost meanwhile is replaced after it, not in it.
func TestHandOverRemoteKept(t *testing.T) {
	for name, end := range map[string]func(*Handover){
		"Resume":    (*Handover).Resume,
		"Reconnect": (*Handover).Reconnect,
		"late":      func(h *Handover) { h.Reconnect(); h.Resume(); _ = h.Complete() },
	} {
		t.Run(name, func(t *testing.T) {
			f := farDevice(t, nbdnltest.Options{}, Options{Connections: 2})
			d := f.old
			before := watchedDescriptors(t, 2)
			end(f.handOver(t))
			talks(t, f.export.end(0), d.watchedOf(0).socket)
			talks(t, f.export.end(1), d.watchedOf(1).socket)
			if open := len(descriptors(t)); open != before || d.State() != nbdnl.StateLive {
				t.Errorf("it is %v, with %d descriptors instead of %d", d.State(), open, before)
			}
			h := f.handOver(t)
			f.export.reset()
			for d.Alive() != 1 {
				<-d.Changes()
			}
			<-time.After(100 * time.Millisecond) // An attempt would be made.
			if n := f.export.count(); n != 2 {
				t.Errorf("%d connections were dialled in a handover", n-2)
			}
			end(h)
			awaitReplaced(t, d, 1)
			talks(t, f.export.end(2), d.watchedOf(1).socket)
			talks(t, f.export.end(0), d.watchedOf(0).socket)
			if err := d.Close(); err != nil {
				t.Error(err)
			}
			checkClean(t, f.Kernel)
		})
	}
}

// TestHandOverRemoteLost has connections die before a handover, and in it: the successor replaces
// them.
func TestHandOverRemoteLost(t *testing.T) {
	f := farDevice(t, nbdnltest.Options{}, Options{Connections: 3, DeadTimeout: time.Hour})
	f.export.set(errors.New("no route"))
	f.export.reset()
	f.export.await(t, f.old, 4)
	h := f.handOver(t)
	defer h.Resume()
	lost := h.Document.Connections[2]
	if !lost.Dead || time.Since(lost.DeadSince) > time.Minute || len(h.Files) != 2 || lost.DeadSince.IsZero() {
		t.Errorf("with %d files, the lost one is %+v", len(h.Files), lost)
	}
	_ = f.export.end(0).SetLinger(0)
	f.export.end(0).Close()
	export := f.export.again(t)
	dialled := f.export.count()
	next := f.adopts(t, h, export)
	awaitReplaced(t, next, 2)
	talks(t, f.export.end(1), next.watchedOf(1).socket)
	if n := f.export.count(); n != dialled || export.count() != 2 || f.Dead(next.Index()) != 0 {
		t.Errorf("the old one has dialled %d, the next one %d", n-dialled, export.count())
	}
	if f.old.Err() != ErrHandedOver || next.Loss() != nil {
		t.Errorf("the old one: %v, a loss: %v", f.old.Err(), next.Loss())
	}
	if err := next.Close(); err != nil {
		t.Error(err)
	}
	checkClean(t, f.Kernel)
}

// TestHandOverRemoteOutage holds that a successor counts for how long there was no connection from
// when the last one was lost, if that is known.
func TestHandOverRemoteOutage(t *testing.T) {
	hour := time.Now().Add(-time.Hour)
	for _, since := range []time.Time{hour, {}} {
		f := farDevice(t, nbdnltest.Options{}, Options{DeadTimeout: time.Hour})
		away := errors.New("no route")
		f.export.set(away)
		f.export.reset()
		f.export.await(t, f.old, 3)
		h := f.handOver(t)
		doc := &h.Document
		if o := f.old.Outage(); !doc.Connections[0].DeadSince.Equal(o.Since) || len(h.Files) != 0 {
			t.Errorf("%+v with %d files, while it is %+v", doc, len(h.Files), o)
		}
		doc.Connections[0].DeadSince, doc.DeadTimeout = since, 30*time.Minute
		begun := time.Now()
		export := f.export.again(t)
		export.set(away)
		next := f.adopts(t, h, export)
		export.await(t, next, 2)
		o := next.Outage()
		if !since.IsZero() && !o.Since.Equal(since) || since.IsZero() && o.Since.Before(begun) || o.Err == nil {
			t.Errorf("since %v: %+v", since, o)
		}
		export.set(nil)
		awaitReplaced(t, next, 1)
		if loss := next.Loss(); (loss != nil) != !since.IsZero() {
			t.Errorf("since %v: a loss: %v", since, loss)
		}
		next.losses.excuse()
		next.losses.forget()
		if err := next.Close(); err != nil {
			t.Error(err)
		}
		checkClean(t, f.Kernel)
	}
}

// TestHandOverRemoteLast has a successor go wrong when everything was said: the device has the
// connections that it had, unless the successor may watch over it.
func TestHandOverRemoteLast(t *testing.T) {
	for _, dies := range []bool{true, false} {
		f := farDevice(t, nbdnltest.Options{}, Options{Timeout: time.Second, DeadTimeout: time.Hour})
		ours, theirs := passage(t)
		handed := make(chan error, 1)
		go func() { handed <- f.old.HandOverTo(t.Context(), ours, HandOverOptions{}) }()
		_, files, err := receive(theirs)
		l := newLines(theirs)
		err = errors.Join(err, l.say(line{Ready: true}))
		if err := errors.Join(err, l.expect(t.Context(), func(l line) bool { return l.Go })); err != nil {
			t.Fatal(err)
		}
		if dies {
			closeAll(files)
			theirs.Close()
		}
		err = <-handed
		if err == nil || errors.Is(err, ErrHandedOver) == dies || isDone(f.old) == dies ||
			strings.Contains(err.Error(), "it is watched here") != dies {
			t.Errorf("it dies %t: %v", dies, err)
		}
		if !dies {
			talks(t, f.export.end(0), files[0])
			closeAll(files)
			if err := f.options.Client.DropAny(t.Context(), f.old.Index()); err != nil {
				t.Error(err)
			}
			continue
		}
		talks(t, f.export.end(0), f.old.watchedOf(0).socket)
		if n := f.export.count(); n != 1 {
			t.Errorf("%d connections were dialled", n)
		}
		f.export.reset()
		awaitReplaced(t, f.old, 1)
		if err := f.old.Close(); err != nil {
			t.Error(err)
		}
		checkClean(t, f.Kernel)
	}
}

// TestWatchedHand holds that a connection goes along as long as whoever has it did not reset it.
func TestWatchedHand(t *testing.T) {
	nc, peer := tcpPair(t)
	w, err := newWatched(nc, func() bool { return false })
	if err != nil {
		t.Fatal(err)
	}
	since := time.Now().Add(-time.Hour)
	check := func(what string, w *watched, dead bool) {
		t.Helper()
		handed, f, err := w.hand(since)
		if handed.Dead != dead || (f == nil) != dead || err != nil || handed.DeadSince.Equal(since) != dead {
			t.Errorf("%s: %+v, %v, %v", what, handed, f, err)
		}
		if f != nil {
			f.Close()
		}
	}
	check("alive", w, false)
	_ = peer.(*net.TCPConn).SetLinger(0)
	peer.Close()
	<-w.Stopped()
	check("hung up", w, false)
	w.Close()
	check("closed", w, true)
	if _, f, err := (&watched{socket: w.socket, closed: make(chan struct{})}).hand(since); err == nil || f != nil {
		t.Error("a connection that can't be copied is taken for dead")
	}
	again := lostBefore(since, w.ends)
	check("lost before", again, true)
	if err := again.ended(t); err != errLostBefore || again.Disconnected() {
		t.Errorf("it ends with %v", err)
	}
	again.Close()
	check("lost before, and closed", again, true)
}

// TestWatchedHandReset holds that a connection which is about to be reset is said to be dead when
// it was.
func TestWatchedHandReset(t *testing.T) {
	nc, _ := tcpPair(t)
	w, err := newWatched(nc, func() bool { return false })
	if err != nil {
		t.Fatal(err)
	}
	begun, finish := make(chan struct{}), make(chan struct{})
	go w.closing.Do(func() {
		close(w.closed)
		w.stop()
		w.socket.Close()
		close(begun)
		<-finish
	})
	<-begun
	handed := make(chan HandedConnection, 1)
	go func() {
		h, _, _ := w.hand(time.Now())
		handed <- h
	}()
	select {
	case <-handed:
		t.Error("it is said to be dead before")
	case <-time.After(10 * time.Millisecond):
	}
	close(finish)
	if h := <-handed; !h.Dead {
		t.Error("it is not dead in the end")
	}
}

// TestWatchedFails holds that nothing is watched, nor open, of connections one of which can't be.
func TestWatchedFails(t *testing.T) {
	f := farDevice(t, nbdnltest.Options{}, Options{})
	before := watchedDescriptors(t, 1)
	files := copies(t, []*os.File{f.old.watchedOf(0).socket, f.old.watchedOf(0).socket})
	files[1].Close()
	conns, err := f.old.watch([]link{{socket: files[0]}, {}, {socket: files[1]}})
	if err == nil || conns != nil {
		t.Errorf("%v, %v", conns, err)
	}
	if open := descriptors(t); len(open) != before {
		t.Errorf("there were %d descriptors, and now are %q", before, open)
	}
	talks(t, f.export.end(0), f.old.watchedOf(0).socket)
}
