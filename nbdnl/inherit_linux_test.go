package nbdnl_test

import (
	"errors"
	"os"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// TestInherit has a client go on with a device that another one has connected: it is refused what
// is not that, and knows it then as its own, also where the kernel keeps no identifiers.
func TestInherit(t *testing.T) {
	for _, release := range []string{"5.10.0", "6.1.0"} {
		t.Run(release, func(t *testing.T) {
			k := nbdnltest.New(t, nbdnltest.Options{Devices: 1, Release: release})
			first, next := newClient(t, k.System()), newClient(t, k.System())
			w := world{T: t, Client: first}
			r := serve(w)
			cfg := config(r)
			index := w.connect(cfg)
			incarnation := k.System().IncarnationOf(index)
			anonymous := release == "5.10.0"

			if err := next.Inherit(index+7, cfg.Identifier, incarnation, cfg.Timeout); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("no such device: %v", err)
			}
			identifier, other := cfg.Identifier, incarnation+1
			if !anonymous {
				identifier, other = "another", incarnation
			}
			if err := next.Inherit(index, identifier, other, cfg.Timeout); !errors.Is(err, nbdnl.ErrNotOwner) {
				t.Errorf("another device: %v", err)
			}
			timeout := 7 * time.Second
			update := nbdnl.Update{Timeout: &timeout}
			err := next.Reconfigure(t.Context(), index, cfg.Identifier, update)
			if anonymous != errors.Is(err, errors.ErrUnsupported) || !anonymous && err != nil {
				t.Errorf("before it is inherited: %v", err)
			}
			if err := next.Inherit(index, cfg.Identifier, incarnation, cfg.Timeout); err != nil {
				t.Fatal(err)
			}
			if err := next.Reconfigure(t.Context(), index, cfg.Identifier, update); err != nil {
				t.Errorf("after it is inherited: %v", err)
			}
			if err := next.Drop(t.Context(), index, "another"); !errors.Is(err, nbdnl.ErrNotOwner) {
				t.Errorf("by another identifier: %v", err)
			}
			if err := next.Drop(t.Context(), index, cfg.Identifier); err != nil {
				t.Error(err)
			}
			<-r.done
			err = next.Inherit(index, cfg.Identifier, incarnation, cfg.Timeout)
			if !errors.Is(err, nbdnl.ErrNotConnected) {
				t.Errorf("after its end: %v", err)
			}
		})
	}
}
