package nbdnl_test

import (
	"errors"
	"os"
	"slices"
	"sync"
	"syscall"
	"testing"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// TestLease holds that an index is leased once, and what one holder leaves to the next.
func TestLease(t *testing.T) {
	t.Setenv("NBDCTL_STATE_DIR", t.TempDir())
	first, err := nbdnl.TryLease(7)
	if err != nil || first.Index() != 7 || first.Left() != "" {
		t.Fatalf("index %d, left %q, error %v", first.Index(), first.Left(), err)
	}
	if _, err := nbdnl.TryLease(7); !errors.Is(err, nbdnl.ErrBusy) {
		t.Errorf("a second one: %v, want ErrBusy", err)
	}
	other, err := nbdnl.TryLease(3)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := nbdnl.Leased(); !slices.Equal(got, []int{3, 7}) || err != nil {
		t.Errorf("leased %v, error %v", got, err)
	}
	for _, id := range []string{"a long identifier", "short"} {
		if err := first.Note(id); err != nil {
			t.Error(err)
		}
	}
	if err := first.Note("two\nlines"); err == nil {
		t.Error("an identifier with a line break was noted")
	}
	if err := errors.Join(first.Leave(), other.Release()); err != nil {
		t.Error(err)
	}
	next, err := nbdnl.TryLease(7)
	if err != nil || next.Left() != "short" {
		t.Fatalf("left %q, error %v", next.Left(), err)
	}
	if err := next.Release(); err != nil {
		t.Error(err)
	}
	if got, err := nbdnl.Leased(); len(got) > 0 || err != nil {
		t.Errorf("leased %v, error %v", got, err)
	}
	for _, index := range []int{-1, 1 << 20} {
		if _, err := nbdnl.TryLease(index); !errors.Is(err, os.ErrInvalid) {
			t.Errorf("index %d: %v", index, err)
		}
	}
}

// TestLeftAt holds that the lease of a living process is told from one that was left, and that to ask keeps nobody from taking it.
func TestLeftAt(t *testing.T) {
	t.Setenv("NBDCTL_STATE_DIR", t.TempDir())
	wantLeft := func(want string) {
		t.Helper()
		if got, err := nbdnl.LeftAt(7); got != want || err != nil {
			t.Errorf("left %q, error %v, want %q", got, err, want)
		}
	}
	wantLeft("")
	l, err := nbdnl.TryLease(7)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Note("pool:1"); err != nil {
		t.Error(err)
	}
	wantLeft("") // Its holder lives.
	if err := l.Leave(); err != nil {
		t.Error(err)
	}
	wantLeft("pool:1")
	var asker sync.WaitGroup
	stop := make(chan struct{})
	asker.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if _, err := nbdnl.LeftAt(7); err != nil {
				t.Errorf("asking: %v", err)
			}
		}
	})
	for range 100 {
		if l, err = nbdnl.TryLease(7); err != nil || l.Left() != "pool:1" {
			t.Errorf("taking what is asked about: left %q, error %v", l.Left(), err)
			break
		}
		if err := l.Leave(); err != nil {
			t.Error(err)
		}
	}
	close(stop)
	asker.Wait()
	if l, err = nbdnl.TryLease(7); err != nil {
		t.Fatal(err)
	}
	if err := l.Release(); err != nil {
		t.Error(err)
	}
	wantLeft("")
}

// TestAddIndex adds devices, and says why it can't.
func TestAddIndex(t *testing.T) {
	k := nbdnltest.New(t, nbdnltest.Options{Devices: 2})
	c := k.Client()
	for _, index := range []int{1, 5, 5} {
		if err := c.AddIndex(t.Context(), index); err != nil {
			t.Error(err)
		}
		if st, err := c.Status(t.Context(), index); err != nil || st.State != nbdnl.StateIdle {
			t.Errorf("%d is %s, error %v", index, st.State, err)
		}
	}
	if got, err := c.Indexes(); !slices.Equal(got, []int{0, 1, 5}) || err != nil {
		t.Errorf("there are %v, error %v", got, err)
	}
	k.Fail(nbdnltest.Connect, syscall.ENOMEM)
	if err := c.AddIndex(t.Context(), 6); !errors.Is(err, syscall.ENOMEM) {
		t.Errorf("error %v, want ENOMEM", err)
	}
	if err := nbdnltest.New(t, nbdnltest.Options{NoPrivilege: true}).Client().AddIndex(t.Context(), 20); !errors.Is(err, os.ErrPermission) {
		t.Errorf("error %v, want ErrPermission", err)
	}
}

// TestKernelAddIndex adds a device to the kernel, which complains of nothing.
func TestKernelAddIndex(t *testing.T) {
	nbdnltest.RequireKernel(t)
	c, err := nbdnl.New()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	const index = 70
	for range 2 {
		if err := c.AddIndex(t.Context(), index); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(nbdnl.Path(index)); err != nil {
		t.Error(err)
	}
	if st, err := c.Status(t.Context(), index); err != nil || st.State != nbdnl.StateIdle {
		t.Errorf("it is %s, error %v", st.State, err)
	}
}
