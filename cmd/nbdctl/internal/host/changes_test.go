package host

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

// TestChanges shows that records are noticed from before there is a store.
func TestChanges(t *testing.T) {
	s := &Store{dir: filepath.Join(t.TempDir(), "deep", "state")}
	changes, err := s.Changes(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	r := newRecord(uuidA, "")
	state, err := s.newStateDir(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	await := func(what string, done func([]Entry) bool) {
		t.Helper()
		deadline := time.NewTimer(10 * time.Second)
		defer deadline.Stop()
		for {
			select {
			case <-changes:
				entries, err := s.Entries()
				if err == nil && done(entries) {
					return
				}
			case <-deadline.C:
				t.Fatalf("%s goes unnoticed", what)
			}
		}
	}
	await("a new record", func(e []Entry) bool { return len(e) == 1 })
	r.Phase = PhaseLive
	if err := r.write(state.path); err != nil {
		t.Fatal(err)
	}
	await("a changed record", func(e []Entry) bool { return len(e) == 1 && e[0].Phase == PhaseLive })
	if err := state.end(); err != nil {
		t.Fatal(err)
	}
	await("the end of a record", func(e []Entry) bool { return len(e) == 0 })
	if err := os.RemoveAll(s.dir); err != nil {
		t.Fatal(err)
	}
	if state, err = s.newStateDir(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	await("a record in a new store", func(e []Entry) bool { return len(e) == 1 })
	if err := state.end(); err != nil {
		t.Fatal(err)
	}
}
