package nbdnl_test

import (
	"fmt"
	"io"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// The end of one use of the index is what is waited for, not an idle index.
func TestWaitFreeReconnected(t *testing.T) {
	k := nbdnltest.New(t, nbdnltest.Options{})
	system := k.System()
	uevents, looking := system.Uevents, make(chan struct{})
	system.Uevents = func() (io.ReadCloser, error) {
		close(looking) // at this use: it has been seen before
		return uevents()
	}
	c, err := system.NewClient()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	w := world{T: t, Client: c}
	index := w.connect(unserved(t))
	done := make(chan error)
	go func() { done <- w.WaitFree(t.Context(), index) }()
	<-looking
	w.wantDone("disconnect", w.DropAny(t.Context(), index))
	w.wantDone("connect", w.ConnectIndex(t.Context(), index, unserved(t)))
	w.wantDone("wait", <-done)
}

// Where uevents can't be had, looking now and then has to do.
func TestWaitFreeWithoutUevents(t *testing.T) {
	k := nbdnltest.New(t, nbdnltest.Options{})
	system := k.System()
	system.Uevents = func() (io.ReadCloser, error) { return nil, os.ErrPermission }
	c, err := system.NewClient()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	w := world{T: t, Client: c}
	index := w.connect(unserved(t))
	_, release := k.Hold(index)
	w.wantDone("disconnect", w.DropAny(t.Context(), index))
	time.AfterFunc(20*time.Millisecond, release)
	w.wantDone("wait", w.WaitFree(t.Context(), index))
}

func TestWaitReady(t *testing.T) {
	w, k := fakeWorld(t, nbdnltest.Options{})
	cfg := unserved(t)
	index := w.connect(cfg)
	k.Partition(index, 2)
	partitions, err := w.WaitReady(t.Context(), index)
	w.wantDone("wait until ready", err)
	if diff := cmp.Diff([]string{fmt.Sprintf("nbd%dp2", index)}, partitions); diff != "" {
		t.Errorf("partitions (-want +got):\n%s", diff)
	}
}
