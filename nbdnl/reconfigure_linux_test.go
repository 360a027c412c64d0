package nbdnl_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// What only the fake kernel can be made to do to a reconfigure.

// A socket for which no connection dies is given up in the end, and was not asked about too often.
func TestReconfigurePatience(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, k := fakeWorld(t, nbdnltest.Options{})
		cfg := unserved(t)
		index := w.connect(cfg)
		begin := time.Now()
		w.wantDropped(w.Reconfigure(t.Context(), index, cfg.Identifier, nbdnl.Update{Sockets: unserved(t).Sockets}), 0)
		if d := time.Since(begin); d < 3*time.Second || d > 4*time.Second {
			t.Errorf("gave up after %v", d)
		}
		if n := k.Commands(nbdnltest.Reconfigure); n > 100 {
			t.Errorf("%d commands", n)
		}
		if s := k.Setting(index); s.Timeout != 5 {
			t.Errorf("setting is %+v", s)
		}
	})
}

// A replacement that stays behind in the kernel may have happened or not, and says so.
func TestReconfigureStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, k := fakeWorld(t, nbdnltest.Options{})
		cfg := unserved(t)
		index := w.connect(cfg)
		unblock := k.Block(nbdnltest.Reconfigure)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		err := w.Reconfigure(ctx, index, cfg.Identifier, nbdnl.Update{Sockets: unserved(t).Sockets})
		w.wantError(err, context.DeadlineExceeded, nbdnl.ErrNotVerified)
		unblock()
		synctest.Wait()
	})
}

// What a reconfigure says is so even if the kernel's answer got lost: sockets that it took are not
// sent again.
func TestReconfigureAnswerLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, k := fakeWorld(t, nbdnltest.Options{})
		cfg, end := ending(t)
		index := w.connect(cfg)
		end()
		k.Mute(nbdnltest.Reconfigure)
		size := int64(4 * mebi)
		w.wantReconfigured(index, cfg.Identifier, nbdnl.Update{Sockets: unserved(t).Sockets})
		k.Mute(nbdnltest.Reconfigure)
		w.wantReconfigured(index, cfg.Identifier, nbdnl.Update{Size: &size})
		if n := k.Commands(nbdnltest.Reconfigure); n != 4 {
			t.Errorf("%d commands, want each one twice", n)
		}
		if got := w.status(index).Size; got != size {
			t.Errorf("size is %d", got)
		}
	})
}

// A kernel that never answers is not asked for ever.
func TestReconfigureAnswersLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, k := fakeWorld(t, nbdnltest.Options{})
		cfg := unserved(t)
		index := w.connect(cfg)
		k.Mute(nbdnltest.Reconfigure)
		k.Mute(nbdnltest.Reconfigure)
		size := int64(4 * mebi)
		if err := w.Reconfigure(t.Context(), index, cfg.Identifier, nbdnl.Update{Size: &size}); err == nil {
			t.Error("two answers were lost, and no error")
		}
		if n := k.Commands(nbdnltest.Reconfigure); n != 2 {
			t.Errorf("%d commands, want 2", n)
		}
	})
}

// What the kernel has not done is no success.
func TestReconfigureIneffective(t *testing.T) {
	w, k := fakeWorld(t, nbdnltest.Options{})
	cfg := unserved(t)
	index := w.connect(cfg)
	k.IgnoreSize()
	size, block := int64(2*mebi), 4096
	err := w.Reconfigure(t.Context(), index, cfg.Identifier, nbdnl.Update{Size: &size, BlockSize: &block})
	w.wantError(err, errors.ErrUnsupported)
	var unsupported *nbdnl.UnsupportedError
	if !errors.As(err, &unsupported) || unsupported.Setting != "size" || unsupported.Got != "1048576" {
		t.Errorf("error is %v", err)
	}
}

// An index that changed hands before the command is left alone.
func TestReconfigureIndexUsedAnew(t *testing.T) {
	w, k := fakeWorld(t, nbdnltest.Options{})
	cfg := unserved(t)
	index := w.connect(cfg)
	// Commands wait for each other, and this one until the index is another's.
	unblock := k.Block(nbdnltest.Status)
	for range 8 {
		go func() { _, _ = w.Status(t.Context(), 9) }()
	}
	for k.Commands(nbdnltest.Status) < 8 {
		<-time.After(time.Millisecond)
	}
	done := make(chan error)
	size := int64(2 * mebi)
	go func() {
		done <- w.Reconfigure(t.Context(), index, cfg.Identifier, nbdnl.Update{Size: &size})
	}()
	go func() { done <- w.DropAny(t.Context(), index) }()
	<-time.After(20 * time.Millisecond)
	k.Replace(index)
	unblock()
	w.wantError(<-done, nbdnl.ErrNotOwner)
	w.wantError(<-done, nbdnl.ErrNotOwner)
	if n := k.Commands(nbdnltest.Reconfigure) + k.Commands(nbdnltest.Disconnect); n != 0 {
		t.Errorf("%d commands were given", n)
	}
}
