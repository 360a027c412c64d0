package nbdnl_test

import (
	"context"
	"errors"
	"os"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
)

// watchScenarios are those of events.
var watchScenarios = []scenario{
	{"a watch sees what happens, whoever does it", nbdnl.ModeNetlink, func(w world) {
		other := w.another()
		before := config(serve(w))
		old := w.connect(before)
		watch := w.watch()
		if d := watch.Devices(); len(d) != 1 || d[0].Index != old || !carries(d[0], before) {
			w.Errorf("devices at the start: %+v", d)
		}

		r := serve(w)
		cfg := config(r)
		cfg.DeadConnTimeout = time.Minute
		index, err := other.Connect(w.Context(), cfg)
		w.wantDone("connect", err)
		live := watch.want(index, nbdnl.EventConnect)
		began := live.Previous.State == nbdnl.StateIdle && live.Status.State == nbdnl.StateLive
		if !began || live.Status.Size != mebi || !carries(live.Status, cfg) {
			w.Errorf("connect is %+v", live)
		}
		size := int64(2 * mebi)
		w.wantDone("resize", other.Reconfigure(w.Context(), index, cfg.Identifier, nbdnl.Update{Size: &size}))
		if e := watch.want(index, nbdnl.EventResize); e.Status.Size != size || e.Previous.Size != mebi {
			w.Errorf("resize is %+v", e)
		}
		w.cut(index, r)
		if e := watch.want(index, nbdnl.EventLinkDead); !carries(e.Status, cfg) {
			w.Errorf("link-dead is %+v", e)
		}
		w.wantDone("reconfigure", other.Reconfigure(w.Context(), index, cfg.Identifier, sockets(serve(w))))
		w.wantDone("disconnect", other.Drop(w.Context(), index, cfg.Identifier))
		e := watch.want(index, nbdnl.EventDisconnect)
		if e.Status.State != nbdnl.StateIdle || !carries(e.Previous, cfg) {
			w.Errorf("disconnect is %+v", e)
		}
		w.wantDone("disconnect", w.Drop(w.Context(), old, before.Identifier))
		watch.want(old, nbdnl.EventDisconnect)
	}},
	{"a watch does not miss a use of an index between two looks", nbdnl.ModeNone, func(w world) {
		watch := w.watch()
		cfg := config(serve(w))
		index := w.connect(cfg)
		watch.want(index, nbdnl.EventConnect)
		w.wantDone("disconnect", w.Drop(w.Context(), index, cfg.Identifier))
		w.wantState(index, nbdnl.StateIdle)
		next := config(serve(w))
		w.wantDone("connect", w.ConnectIndex(w.Context(), index, next))
		if e := watch.want(index, nbdnl.EventDisconnect); !carries(e.Previous, cfg) || e.Status.Connected() {
			w.Errorf("disconnect is %+v", e)
		}
		if e := watch.want(index, nbdnl.EventConnect); !carries(e.Status, next) || e.Previous.Connected() {
			w.Errorf("connect is %+v", e)
		}
		w.wantDone("disconnect", w.Drop(w.Context(), index, next.Identifier))
	}},
	{"a watch ends with its context", nbdnl.ModeNone, func(w world) {
		ctx, cancel := context.WithCancelCause(w.Context())
		watch, err := w.Watch(ctx)
		if err != nil {
			w.Fatal(err)
		}
		defer watch.Close()
		cause := errors.New("enough")
		time.AfterFunc(20*time.Millisecond, func() { cancel(cause) })
		for err == nil {
			_, err = watch.Next()
		}
		w.wantError(err, cause)

		watch, err = w.Watch(w.Context())
		if err != nil {
			w.Fatal(err)
		}
		time.AfterFunc(20*time.Millisecond, watch.Close)
		for err == nil {
			_, err = watch.Next()
		}
		w.wantError(err, os.ErrClosed)
	}},
}
