package host

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
)

const (
	uuidA = "0a0a0a0a-0000-4000-8000-000000000001"
	uuidB = "0b0b0b0b-0000-4000-8000-000000000002"
)

func newStore(t *testing.T) *Store {
	t.Helper()
	t.Setenv("NBDCTL_STATE_DIR", filepath.Join(t.TempDir(), "state"))
	s, err := OpenStore()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func newRecord(uuid, label string) *Record {
	return &Record{
		Version:    recordVersion,
		UUID:       uuid,
		Identifier: "nbdctl:" + uuid,
		Phase:      PhaseConnecting,
		PID:        os.Getpid(),
		Since:      time.Now(),
		Spec:       Spec{Label: label, Kind: "memory", Size: 1 << 20},
	}
}

// entries is the store's content by UUID.
func entries(t *testing.T, s *Store) map[string]Entry {
	t.Helper()
	list, err := s.Entries()
	if err != nil {
		t.Fatal(err)
	}
	m := make(map[string]Entry)
	for _, e := range list {
		m[e.UUID] = e
	}
	return m
}

// leftovers lists what is below the store's directory.
func leftovers(t *testing.T, s *Store) (names []string) {
	t.Helper()
	dir, err := os.ReadDir(s.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	for _, d := range dir {
		names = append(names, d.Name())
	}
	return names
}

// TestStateDirectory holds what the directory of a process shows from its making to its end.
func TestStateDirectory(t *testing.T) {
	s := newStore(t)
	if got := entries(t, s); len(got) != 0 {
		t.Fatalf("a store that was never used has %v", got)
	}
	r := newRecord(uuidA, "scratch")
	state, err := s.newStateDir(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	e, ok := entries(t, s)[uuidA]
	if !ok || !e.Alive || e.Phase != PhaseConnecting || e.Spec.Label != "scratch" {
		t.Fatalf("the entry is %+v", e)
	}
	if e.Log != filepath.Join(state.path, "log") {
		t.Fatalf("its log is %s", e.Log)
	}
	index := 3
	r.Index, r.Phase = &index, PhaseLive
	if err := r.write(state.path); err != nil {
		t.Fatal(err)
	}
	if e := entries(t, s)[uuidA]; e.Device() != "nbd3" || e.Phase != PhaseLive {
		t.Fatalf("after the update the entry is %+v", e)
	}
	for name, want := range map[string]fs.FileMode{"": 0o755, "state.json": 0o644, "lock": 0o644} {
		st, err := os.Stat(filepath.Join(state.path, name))
		if err != nil || st.Mode().Perm() != want {
			t.Errorf("%q has mode %v (%v), want %v", name, st.Mode().Perm(), err, want)
		}
	}
	if err := state.end(); err != nil {
		t.Fatal(err)
	}
	if got := leftovers(t, s); len(got) != 0 {
		t.Errorf("left behind: %v", got)
	}
}

// TestWaitForEnd shows that Wait ends with the process, whether it cleaned up
// or was killed.
func TestWaitForEnd(t *testing.T) {
	for _, killed := range []bool{false, true} {
		s := newStore(t)
		r := newRecord(uuidA, "")
		r.PID = 0 // not this one, whose end would be waited for too
		state, err := s.newStateDir(t.Context(), r)
		if err != nil {
			t.Fatal(err)
		}
		e := entries(t, s)[uuidA]
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		if err := e.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("waiting for a living process ends with %v", err)
		}
		cancel()
		waited := make(chan error)
		go func() { waited <- e.Wait(t.Context()) }()
		if killed {
			err = state.lock.Close() // all that a killed process does
		} else {
			err = state.end()
		}
		if err := errors.Join(err, <-waited); err != nil {
			t.Errorf("killed %v: %v", killed, err)
		}
		if got := leftovers(t, s); len(got) != 0 {
			t.Errorf("killed %v: left behind: %v", killed, got)
		}
	}
}

func TestLabelsAreUnique(t *testing.T) {
	s := newStore(t)
	first, err := s.newStateDir(t.Context(), newRecord(uuidA, "scratch"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.newStateDir(t.Context(), newRecord(uuidB, "scratch"))
	if exit.Of(err) != exit.Busy {
		t.Errorf("a second scratch: %v, code %d", err, exit.Of(err))
	}
	if got := leftovers(t, s); len(got) != 1 || got[0] != uuidA {
		t.Errorf("the store has %v, want only %s", got, uuidA)
	}
	// The name of a dead process is free.
	if err := first.lock.Close(); err != nil {
		t.Fatal(err)
	}
	second, err := s.newStateDir(t.Context(), newRecord(uuidB, "scratch"))
	if err != nil {
		t.Fatal(err)
	}
	if err := second.end(); err != nil {
		t.Error(err)
	}
}

func TestSweep(t *testing.T) {
	s := newStore(t)
	alive, err := s.newStateDir(t.Context(), newRecord(uuidA, ""))
	if err != nil {
		t.Fatal(err)
	}
	defer alive.end()
	dead, err := s.newStateDir(t.Context(), newRecord(uuidB, ""))
	if err != nil {
		t.Fatal(err)
	}
	dead.lock.Close()

	if err := s.Sweep(t.Context(), func(Entry) bool { return true }); err != nil {
		t.Fatal(err)
	}
	if got := entries(t, s); len(got) != 2 || got[uuidB].Alive {
		t.Errorf("a sweep took a record whose device is still connected: %v", got)
	}
	if err := s.Sweep(t.Context(), func(Entry) bool { return false }); err != nil {
		t.Fatal(err)
	}
	if got := leftovers(t, s); len(got) != 1 || got[0] != uuidA {
		t.Errorf("after the sweep the store has %v, want only %s", got, uuidA)
	}
}

// TestSweepLeftovers shows that what was left half made, half removed or
// damaged goes too, and what is not ours stays.
func TestSweepLeftovers(t *testing.T) {
	s := newStore(t)
	for _, name := range []string{newPrefix + uuidA, gonePrefix + uuidA, uuidB, "claims"} {
		if err := os.MkdirAll(filepath.Join(s.dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(s.dir, uuidB, "state.json"), []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	if !s.Stale() {
		t.Error("the store is not stale")
	}
	if err := s.Sweep(t.Context(), func(Entry) bool { return true }); err != nil {
		t.Fatal(err)
	}
	if got := leftovers(t, s); len(got) != 1 || got[0] != "claims" {
		t.Errorf("after the sweep the store has %v", got)
	}
	if s.Stale() {
		t.Error("the swept store is stale")
	}
}

// TestWaitForProcess shows that Wait waits for the process to end, not only
// for its directory to go.
func TestWaitForProcess(t *testing.T) {
	s := newStore(t)
	sleep := exec.Command("sleep", "100")
	if err := sleep.Start(); err != nil {
		t.Fatal(err)
	}
	r := newRecord(uuidA, "")
	r.PID = sleep.Process.Pid
	state, err := s.newStateDir(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	e := entries(t, s)[uuidA]
	waited := make(chan error, 1)
	begun := make(chan struct{})
	go func() {
		close(begun)
		waited <- e.Wait(t.Context())
	}()
	<-begun
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := e.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("waiting for a living process ends with %v", err)
	}
	if err := state.end(); err != nil {
		t.Fatal(err)
	}
	if err := sleep.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = sleep.Wait() // killed
	if err := <-waited; err != nil {
		t.Error(err)
	}
}

// TestDamagedRecord shows that one bad record does not hide the others.
func TestDamagedRecord(t *testing.T) {
	for name, content := range map[string]string{
		"no JSON":         "{",
		"another's":       `{"version": 1, "uuid": "` + uuidA + `"}`,
		"an empty record": "",
	} {
		s := newStore(t)
		state, err := s.newStateDir(t.Context(), newRecord(uuidA, ""))
		if err != nil {
			t.Fatal(err)
		}
		bad := filepath.Join(s.dir, uuidB)
		if err := os.Mkdir(bad, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(bad, "state.json"), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		list, err := s.Entries()
		if len(list) != 1 || list[0].UUID != uuidA || err == nil || !strings.Contains(err.Error(), bad) {
			t.Errorf("%s: %v, %v", name, list, err)
		}
		if err := state.end(); err != nil {
			t.Error(err)
		}
	}
}

// TestNewerRecord shows that what a later version adds does not hide a device.
func TestNewerRecord(t *testing.T) {
	s := newStore(t)
	dir := filepath.Join(s.dir, uuidA)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{
		"lock": "",
		"state.json": `{"version": 2, "uuid": "` + uuidA + `", "index": 9, "phase": "migrating", ` +
			`"colour": "blue", "spec": {"kind": "memory"}}`,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if e := entries(t, s)[uuidA]; e.Record == nil || e.Device() != "nbd9" || e.Alive {
		t.Errorf("the entry is %+v", e)
	}
}

func TestStateDirRefused(t *testing.T) {
	for _, dir := range []string{"relative/path", "/" + strings.Repeat("x", 70)} {
		t.Setenv("NBDCTL_STATE_DIR", dir)
		if _, err := OpenStore(); err == nil {
			t.Errorf("NBDCTL_STATE_DIR=%s is accepted", dir)
		}
	}
}

// TestAskingTakesNothing shows that asking whether a lock is held never keeps
// another from taking it, and that a reader cannot hold it.
func TestAskingTakesNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	if err := os.WriteFile(path, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	reader, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	if err := lock(reader); err == nil {
		t.Error("a file open only for reading can be locked")
	}
	if held, err := lockHeld(path); held || err != nil {
		t.Errorf("a free lock: held %v, %v", held, err)
	}
	f, err := lockTry(path)
	if err != nil {
		t.Fatal(err)
	}
	if held, err := lockHeld(path); !held || err != nil {
		t.Errorf("a held lock: held %v, %v", held, err)
	}
	if _, err := lockTry(path); !errors.Is(err, errLocked) {
		t.Errorf("taking a held lock: %v", err)
	}
	f.Close()
	if held, err := lockHeld(path); held || err != nil {
		t.Errorf("after letting go: held %v, %v", held, err)
	}
}
