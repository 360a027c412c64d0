package nbdnl_test

import (
	"errors"
	"os"
	"testing"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// Where sysfs is missing a device could be made, and neither be examined nor undone.
func TestConnectWithoutSysfs(t *testing.T) {
	for _, mode := range []nbdnl.Mode{nbdnl.ModeNetlink, nbdnl.ModeIoctl} {
		k := nbdnltest.New(t, nbdnltest.Options{})
		system := k.System()
		system.Mode = mode
		w := world{T: t, Client: newClient(t, system)}
		if err := os.Rename(k.Path("sys"), k.Path("elsewhere")); err != nil {
			t.Fatal(err)
		}
		_, err := w.Connect(t.Context(), unserved(t))
		w.wantError(err, os.ErrNotExist)
		w.wantError(w.ConnectIndex(t.Context(), 3, unserved(t)), os.ErrNotExist)
		if n := k.Commands(nbdnltest.Connect); n != 0 {
			t.Errorf("%v: %d connects were sent", mode, n)
		}
		if err := os.Rename(k.Path("elsewhere"), k.Path("sys")); err != nil {
			t.Fatal(err)
		}
	}
}

// Linux 5.10 sleeps for ever in a connect of an index whose device is to go with its last user.
func TestOldKernelRefusesDestroy(t *testing.T) {
	w, k := fakeWorld(t, nbdnltest.Options{Release: "5.10.0-30-amd64"})
	cfg := unserved(t)
	cfg.ClientFlags = nbdnl.DestroyOnDisconnect
	_, err := w.Connect(t.Context(), cfg)
	var lacks *nbdnl.UnsupportedError
	if !errors.As(err, &lacks) || lacks.Reason == "" || k.Commands(nbdnltest.Connect) != 0 {
		t.Errorf("connect: %v", err)
	}
	cfg.ClientFlags = 0
	index := w.connect(cfg)
	flags := nbdnl.DestroyOnDisconnect
	err = w.Reconfigure(t.Context(), index, cfg.Identifier, nbdnl.Update{ClientFlags: &flags})
	if !errors.As(err, &lacks) || k.Commands(nbdnltest.Reconfigure) != 0 {
		t.Errorf("reconfigure: %v", err)
	}
}
