package claim_test

import (
	"errors"
	"os"
	"slices"
	"sync"
	"testing"

	"github.com/nbdctl/nbdctl/nbdnl/claim"
)

// TestLease holds that an index is leased once, and what one holder leaves to the next.
func TestLease(t *testing.T) {
	dir := claim.Dir(t.TempDir())
	first, err := dir.TryLease(7)
	if err != nil || first.Index() != 7 || first.Left() != "" {
		t.Fatalf("index %d, left %q, error %v", first.Index(), first.Left(), err)
	}
	if _, err := dir.TryLease(7); !errors.Is(err, claim.ErrBusy) {
		t.Errorf("a second one: %v, want ErrBusy", err)
	}
	other, err := dir.TryLease(3)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := dir.Leased(); !slices.Equal(got, []int{3, 7}) || err != nil {
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
	next, err := dir.TryLease(7)
	if err != nil || next.Left() != "short" {
		t.Fatalf("left %q, error %v", next.Left(), err)
	}
	if err := next.Release(); err != nil {
		t.Error(err)
	}
	if got, err := dir.Leased(); len(got) > 0 || err != nil {
		t.Errorf("leased %v, error %v", got, err)
	}
	for _, index := range []int{-1, 1 << 20} {
		if _, err := dir.TryLease(index); !errors.Is(err, os.ErrInvalid) {
			t.Errorf("index %d: %v", index, err)
		}
	}
}

// TestLeftAt holds that the lease of a living process is told from one that was left, and that to
// ask keeps nobody from taking it.
func TestLeftAt(t *testing.T) {
	dir := claim.Dir(t.TempDir())
	wantLeft := func(want string) {
		t.Helper()
		if got, err := dir.LeftAt(7); got != want || err != nil {
			t.Errorf("left %q, error %v, want %q", got, err, want)
		}
	}
	wantLeft("")
	l, err := dir.TryLease(7)
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
			if _, err := dir.LeftAt(7); err != nil {
				t.Errorf("asking: %v", err)
			}
		}
	})
	for range 100 {
		if l, err = dir.TryLease(7); err != nil {
			t.Errorf("taking what is asked about: %v", err)
			break
		}
		if l.Left() != "pool:1" {
			t.Errorf("taking what is asked about: left %q", l.Left())
		}
		if err := l.Leave(); err != nil {
			t.Error(err)
		}
	}
	close(stop)
	asker.Wait()
	if l, err = dir.TryLease(7); err != nil {
		t.Fatal(err)
	}
	if err := l.Release(); err != nil {
		t.Error(err)
	}
	wantLeft("")
}

// TestInherit holds that a lease goes to another holder without a moment in which nobody has it.
func TestInherit(t *testing.T) {
	dir := claim.Dir(t.TempDir())
	free := func() bool {
		l, err := dir.TryLease(7)
		if err == nil {
			err = l.Leave()
		}
		if err != nil && !errors.Is(err, claim.ErrBusy) {
			t.Fatal(err)
		}
		return err == nil
	}
	old, err := dir.TryLease(7)
	if err != nil {
		t.Fatal(err)
	}
	f, err := old.File()
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(old.Note("pool:x"), old.Leave()); err != nil || free() {
		t.Fatalf("the lease is free: %v", err)
	}
	l, err := dir.Inherit(7, f)
	if err != nil || l.Index() != 7 || free() {
		t.Fatalf("inherited: %v", err)
	}
	again, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Release(); err != nil {
		t.Error(err)
	}
	if got, err := dir.Leased(); len(got) > 0 || err != nil {
		t.Errorf("leased %v, error %v", got, err)
	}
	if _, err := dir.Inherit(7, again); !errors.Is(err, claim.ErrBusy) {
		t.Errorf("inherited what was given up: %v", err)
	}
	if !free() {
		t.Error("the lease is held")
	}

	// Of two who have the same lease both may give it up.
	one, err := dir.TryLease(8)
	if err != nil {
		t.Fatal(err)
	}
	if f, err = one.File(); err != nil {
		t.Fatal(err)
	}
	two, err := dir.Inherit(8, f)
	if err := errors.Join(err, one.Release()); err != nil {
		t.Fatal(err)
	}
	other, err := dir.TryLease(8)
	if err != nil {
		t.Fatal(err)
	}
	if err := two.Release(); err != nil {
		t.Error(err)
	}
	if got, err := dir.Leased(); !slices.Equal(got, []int{7, 8}) || err != nil {
		t.Errorf("leased %v, error %v: another one's was given up", got, err)
	}
	if err := other.Release(); err != nil {
		t.Error(err)
	}
}
