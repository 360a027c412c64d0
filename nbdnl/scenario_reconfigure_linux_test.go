package nbdnl_test

import (
	"context"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
)

// reconfigureScenarios are those of changes to a device in use.
var reconfigureScenarios = []scenario{
	{"reconfigure sets the size", nbdnl.ModeNone, func(w world) {
		cfg := config(serve(w))
		index := w.connect(cfg)
		size, timeout := int64(2*mebi), 9*time.Second
		w.wantReconfigured(index, cfg.Identifier, nbdnl.Update{Size: &size, Timeout: &timeout})
		if got := w.status(index).Size; got != size {
			w.Errorf("size is %d, want %d", got, size)
		}
		w.wantDone("disconnect", w.Drop(w.Context(), index, cfg.Identifier))
		w.wantState(index, nbdnl.StateIdle)
		w.wantError(w.Reconfigure(w.Context(), index, cfg.Identifier, nbdnl.Update{Size: &size}), nbdnl.ErrNotConnected)
	}},
	{"reconfigure sets the block size of a size that it fits", nbdnl.ModeNone, func(w world) {
		cfg := config(serve(w))
		cfg.Size = 2048 + 512
		index := w.connect(cfg)
		block := 2048
		if err := w.Reconfigure(w.Context(), index, cfg.Identifier, nbdnl.Update{BlockSize: &block}); err == nil {
			w.Error("the device has got a tail that can't be read")
		}
		block = 1024
		size := int64(4 * block)
		both := nbdnl.Update{Size: &size, BlockSize: &block}
		w.wantDone("size and block size", w.Reconfigure(w.Context(), index, cfg.Identifier, both))
		block = 4096
		w.wantDone("block size", w.Reconfigure(w.Context(), index, cfg.Identifier, nbdnl.Update{BlockSize: &block}))
		if got := w.status(index); got.Size != size || got.BlockSize != block {
			w.Errorf("size is %d with blocks of %d", got.Size, got.BlockSize)
		}
	}},
	{"a socket takes the place of a dead connection", nbdnl.ModeNetlink, func(w world) {
		old, r := serve(w), serve(w)
		cfg := config(old)
		cfg.DeadConnTimeout = 30 * time.Second
		index := w.connect(cfg)
		old.ours.Close()
		w.wantReconfigured(index, cfg.Identifier, sockets(r))
		w.wantDone("disconnect", w.Drop(w.Context(), index, cfg.Identifier))
		<-r.done
	}},
	{"a socket is dropped when no connection is dead, and is as good as new", nbdnl.ModeNetlink, func(w world) {
		old, r := serve(w), serve(w)
		cfg := config(old)
		index := w.connect(cfg)
		reconfigure := func(ctx context.Context) error { return w.Reconfigure(ctx, index, cfg.Identifier, sockets(r)) }
		err := w.impatiently(nbdnl.ErrNoDeadConnection, reconfigure)
		w.wantError(err, context.DeadlineExceeded)
		w.wantDropped(err, 0)
		time.AfterFunc(50*time.Millisecond, func() { old.ours.Close() })
		w.wantReconfigured(index, cfg.Identifier, sockets(r))
		w.wantDone("disconnect", w.Drop(w.Context(), index, cfg.Identifier))
		<-r.done
	}},
	{"of several sockets those that find no dead connection are named", nbdnl.ModeNetlink, func(w world) {
		first, second := serve(w), serve(w)
		a, b, c := serve(w), serve(w), serve(w)
		cfg := config(first, second)
		cfg.Flags |= nbdnl.FlagCanMultiConn
		index := w.connect(cfg)
		first.ours.Close()
		second.ours.Close()
		ctx, cancel := context.WithTimeout(w.Context(), time.Second)
		defer cancel()
		w.wantDropped(w.Reconfigure(ctx, index, cfg.Identifier, sockets(a, b, c)), 2)
		w.wantDone("disconnect", w.Drop(w.Context(), index, cfg.Identifier))
		<-a.done
		<-b.done
		select {
		case <-c.done:
			w.Error("the kernel has shut down a socket that it has not taken")
		default:
		}
	}},
	{"a device without a timeout takes sockets as well", nbdnl.ModeNetlink, func(w world) {
		old, r := serve(w), serve(w)
		cfg := config(old)
		cfg.Timeout = 0
		index := w.connect(cfg)
		reconfigure := func(ctx context.Context) error { return w.Reconfigure(ctx, index, cfg.Identifier, sockets(r)) }
		w.wantDropped(w.impatiently(nbdnl.ErrNoDeadConnection, reconfigure), 0)
		old.ours.Close()
		w.wantReconfigured(index, cfg.Identifier, sockets(r))
		w.wantNoSendLimit(r)
		w.wantDone("disconnect", w.Drop(w.Context(), index, cfg.Identifier))
		<-r.done
	}},
	{"another program can replace a connection if it knows the timeout", nbdnl.ModeNetlink, func(w world) {
		old, r := serve(w), serve(w)
		cfg := config(old)
		cfg.Timeout = 0
		index := w.connect(cfg)
		other := w.another()
		if w.anonymous {
			w.wantNotOwner(other.Reconfigure(w.Context(), index, cfg.Identifier, sockets(r)))
			return
		}
		w.wantError(other.Reconfigure(w.Context(), index, cfg.Identifier, sockets(r)), nbdnl.ErrNotVerified)
		old.ours.Close()
		update := sockets(r)
		timeout := 5 * time.Second
		update.Timeout = &timeout
		w.wantDone("reconfigure", other.Reconfigure(w.Context(), index, cfg.Identifier, update))
		next := serve(w)
		r.ours.Close()
		// That the device has a timeout, a third one does not know, but sees.
		w.wantDone("reconfigure again", w.untilVerified(w.another(), index, cfg.Identifier, sockets(next)))
		w.wantDone("disconnect", w.Drop(w.Context(), index, cfg.Identifier))
		<-next.done
	}},
}
