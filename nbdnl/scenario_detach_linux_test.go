package nbdnl_test

import (
	"errors"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/holder"
)

// detachScenarios are those of careful disconnects.
var detachScenarios = []scenario{
	{"detach leaves nothing", nbdnl.ModeNone, func(w world) {
		r := serve(w)
		cfg := config(r)
		index := w.connect(cfg)
		w.wantDone("detach", w.Detach(w.Context(), index, nbdnl.DetachOptions{Identifier: cfg.Identifier}))
		w.wantState(index, nbdnl.StateIdle)
		<-r.done
		cfg = config(serve(w))
		w.wantDone("connect again", w.ConnectIndex(w.Context(), index, cfg))
		w.wantDone("detach again", w.Detach(w.Context(), index, nbdnl.DetachOptions{Any: true}))
		w.wantState(index, nbdnl.StateIdle)
	}},
	{"detach refuses a device that is open, and says who", nbdnl.ModeNone, func(w world) {
		cfg := config(serve(w))
		index := w.connect(cfg)
		release := w.hold(index)
		err := w.Detach(w.Context(), index, nbdnl.DetachOptions{Identifier: cfg.Identifier})
		var busy *nbdnl.BusyError
		if !errors.As(err, &busy) || busy.Disconnected || len(busy.Holders) != 1 {
			w.Fatalf("detach of an open device: %v", err)
		}
		w.wantError(err, nbdnl.ErrBusy)
		h := busy.Holders[0]
		known := h.Kind == holder.Process && h.PID != 0 && h.Comm != ""
		if !known || h.Device != nbdnl.Path(index)[len("/dev/"):] {
			w.Errorf("holder is %+v", h)
		}
		w.wantState(index, nbdnl.StateLive)
		release()
		o := nbdnl.DetachOptions{Identifier: cfg.Identifier}
		w.wantDone("detach after release", w.Detach(w.Context(), index, o))
	}},
	{"detach waits for a prober", nbdnl.ModeNone, func(w world) {
		cfg := config(serve(w))
		index := w.connect(cfg)
		time.AfterFunc(100*time.Millisecond, w.hold(index))
		w.wantDone("detach", w.Detach(w.Context(), index, nbdnl.DetachOptions{Identifier: cfg.Identifier}))
		w.wantState(index, nbdnl.StateIdle)
	}},
	{"forced detach of an open device says that it is not free", nbdnl.ModeNone, func(w world) {
		r := serve(w)
		cfg := config(r)
		index := w.connect(cfg)
		release := w.hold(index)
		err := w.Detach(w.Context(), index, nbdnl.DetachOptions{Identifier: cfg.Identifier, Force: true})
		var busy *nbdnl.BusyError
		if !errors.As(err, &busy) || !busy.Disconnected || len(busy.Holders) != 1 {
			w.Fatalf("forced detach of an open device: %v", err)
		}
		<-r.done
		w.wantState(index, nbdnl.StateDisconnecting)
		release()
		w.wantDone("wait", w.WaitFree(w.Context(), index))
	}},
	{"the first of two detaches does it", nbdnl.ModeNone, func(w world) {
		cfg := config(serve(w))
		index := w.connect(cfg)
		errs := make(chan error, 2)
		for range 2 {
			go func() {
				errs <- w.Detach(w.Context(), index, nbdnl.DetachOptions{Identifier: cfg.Identifier})
			}()
		}
		a, b := <-errs, <-errs
		if (a == nil) == (b == nil) {
			w.Fatalf("two detaches: %v and %v", a, b)
		}
		w.wantError(errors.Join(a, b), nbdnl.ErrNotConnected)
	}},
}
