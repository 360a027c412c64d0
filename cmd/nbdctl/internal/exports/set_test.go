package exports

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/backends/file"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
)

// A logBuffer takes a log. Safe for concurrent use.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func fileAt(name, path string) Definition {
	return Definition{Name: name, Spec: host.Spec{Kind: "file", Arg: path}}
}

func inMemory(name string, size int64) Definition {
	return Definition{Name: name, Spec: host.Spec{Kind: "memory", Size: size}}
}

// image makes an image of that size, and returns its path.
func image(t *testing.T, dir, name string, size int) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, make([]byte, size), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// load loads an offer that can be.
func load(t *testing.T, s *Set, o Offer) {
	t.Helper()
	if _, err := s.Load(o); err != nil {
		t.Fatal(err)
	}
}

// sizeOf looks an export up; -1: there is none.
func sizeOf(t *testing.T, s *Set, name string) (int64, func()) {
	t.Helper()
	e, done := s.Lookup(name)
	if e == nil {
		return -1, func() {}
	}
	return e.Size(), done
}

func newSet(t *testing.T) (*Set, *logBuffer) {
	log := new(logBuffer)
	s := New(log)
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s, log
}

// free reports whether nobody has an image.
func free(t *testing.T, path string) bool {
	t.Helper()
	f, err := file.Open(path, file.Options{})
	if errors.Is(err, file.ErrLocked) {
		return false
	}
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	return true
}

// TestLoad holds what becomes of exports when another file is loaded: those that are defined as
// before stay, with what is in them, others come and go, also under their clients.
func TestLoad(t *testing.T) {
	dir := t.TempDir()
	a, b := image(t, dir, "a", 4096), image(t, dir, "b", 8192)
	s, log := newSet(t)
	load(t, s, Offer{Default: "a", Exports: []Definition{fileAt("a", a), inMemory("m", 1<<20), inMemory("n", 1<<20)}})
	if n, done := sizeOf(t, s, ""); n != 4096 {
		t.Errorf("the default one has %d bytes", n)
	} else {
		done()
	}
	memory, done := s.Lookup("m")
	done()
	_, leaveA := s.Lookup("a")
	changed, leaveN := s.Lookup("n")

	warnings, err := s.Load(Offer{Exports: []Definition{fileAt("b", b), inMemory("m", 1<<20), inMemory("n", 2<<20)}})
	const empty = `export "n" is defined anew: new clients find it empty`
	if err != nil || len(warnings) != 1 || warnings[0] != empty {
		t.Errorf("%v, warnings %q", err, warnings)
	}
	if same, done := s.Lookup("m"); same != memory {
		t.Error("an export that is defined as before is another one now")
	} else {
		done()
	}
	for name, want := range map[string]int64{"a": -1, "b": 8192, "n": 2 << 20, "": -1} {
		n, done := sizeOf(t, s, name)
		if done(); n != want {
			t.Errorf("%q has %d bytes, want %d", name, n, want)
		}
	}
	if changed.Size() != 1<<20 || free(t, a) {
		t.Error("clients have lost what they had")
	}
	leaveA()
	leaveN()
	s.settle()
	if !free(t, a) {
		t.Error("what the last client has left is still in use")
	}
	if got := s.Names(); !slices.Equal(got, []string{"b", "m", "n"}) {
		t.Errorf("the names are %q", got)
	}
	if log.String() != "" {
		t.Errorf("the log tells %s", log)
	}
}

// TestLoadFails holds that nothing changes where something can't be opened, or is in use.
func TestLoadFails(t *testing.T) {
	dir := t.TempDir()
	a, made := image(t, dir, "a", 4096), filepath.Join(dir, "made")
	s, _ := newSet(t)
	before := Offer{Exports: []Definition{fileAt("a", a), inMemory("m", 1<<20)}}
	load(t, s, before)
	memory, done := s.Lookup("m")
	done()
	check := func(why string) {
		t.Helper()
		if n, done := sizeOf(t, s, "a"); n != 4096 {
			t.Errorf("%s: a has %d bytes", why, n)
		} else {
			done()
		}
		same, done := s.Lookup("m")
		if done(); same != memory {
			t.Errorf("%s: memory is another one", why)
		}
		if _, err := os.Stat(made); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: what was made for nothing is there: %v", why, err)
		}
		if n, _ := sizeOf(t, s, "made"); n != -1 {
			t.Errorf("%s: something new is there", why)
		}
	}
	create := fileAt("made", made)
	create.Spec.Create, create.Spec.Size = true, 1<<20
	readOnly := fileAt("a", a)
	readOnly.Spec.ReadOnly = true
	o := Offer{Exports: []Definition{create, readOnly, inMemory("m", 2<<20), fileAt("no", filepath.Join(dir, "no"))}}
	if _, err := s.Load(o); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), `export "no"`) {
		t.Errorf("an image that is not there: %v", err)
	}
	check("not there")

	_, leave := s.Lookup("a")
	_, err := s.Load(Offer{Exports: []Definition{create, readOnly}})
	if err == nil || !strings.Contains(err.Error(), `export "a": clients have it as it was defined before (1)`) {
		t.Errorf("an image that a client has: %v", err)
	}
	check("in use")
	leave()
	load(t, s, Offer{Exports: []Definition{readOnly}})
}

// TestLoadDescriptions holds that what people are told of an export changes also while clients have
// it, and nothing else of it does.
func TestLoadDescriptions(t *testing.T) {
	dir := t.TempDir()
	s, _ := newSet(t)
	offer := func(text string) Offer {
		of := func(d Definition) Definition {
			d.Description = text
			return d
		}
		return Offer{
			Exports: []Definition{of(fileAt("a", image(t, dir, "a", 4096))), of(inMemory("m", 1<<20))},
			Folders: []Folder{{Path: dir, Prefix: "i/", Template: of(Definition{Spec: host.Spec{Kind: "file"}})}},
		}
	}
	image(t, dir, "b", 4096)
	load(t, s, offer("before"))
	for _, name := range []string{"a", "m", "i/b"} {
		e, done := s.Lookup(name)
		warnings, err := s.Load(offer("after"))
		if err != nil || len(warnings) > 0 {
			t.Errorf("%s: %v, warnings %q", name, err, warnings)
		}
		again, doneToo := s.Lookup(name)
		if again != e {
			t.Errorf("%s is another export now", name)
		}
		now := s.fixed[name]
		if now == nil {
			now = s.images[name]
		}
		if now.def.Description != "after" {
			t.Errorf("%s is still described as %q", name, now.def.Description)
		}
		done()
		doneToo()
		load(t, s, offer("before"))
	}
}

// TestFolder holds that an image is open while somebody has it, that the one that has its name is
// served, and what is none.
func TestFolder(t *testing.T) {
	dir := t.TempDir()
	s, log := newSet(t)
	load(t, s, Offer{Folders: []Folder{{Path: dir, Prefix: "i/", Template: Definition{Spec: host.Spec{Kind: "file"}}}}})
	a := image(t, dir, "a", 4096)
	image(t, dir, ".b", 4096)
	err := errors.Join(os.Mkdir(filepath.Join(dir, "d"), 0o700), os.Symlink("a", filepath.Join(dir, "link")))
	if err != nil {
		t.Fatal(err)
	}
	first, leave := s.Lookup("i/a")
	second, leaveToo := s.Lookup("i/a")
	if first == nil || first != second || free(t, a) {
		t.Fatalf("%p and %p", first, second)
	}
	leave()
	s.settle()
	if free(t, a) {
		t.Error("it is closed under a client")
	}
	// Another file takes the name.
	if err := os.Rename(image(t, dir, "new", 8192), a); err != nil {
		t.Fatal(err)
	}
	n, leaveNew := sizeOf(t, s, "i/a")
	if n != 8192 || first.Size() != 4096 {
		t.Errorf("under its name there are %d bytes", n)
	}
	leaveToo()
	leaveNew()
	s.settle()
	if !free(t, a) {
		t.Error("nobody has it, and it is in use")
	}
	for _, name := range []string{"i/.b", "i/d", "i/no", "a", "i/", ""} {
		if e, _ := s.Lookup(name); e != nil {
			t.Errorf("%q is an export", name)
		}
	}
	var listed []string
	s.List(func(name, _ string) bool { listed = append(listed, name); return true })
	if diff := cmp.Diff([]string{"i/a", "i/link"}, listed); diff != "" {
		t.Errorf("listed (-want +got):\n%s", diff)
	}
	if log.String() != "" {
		t.Errorf("the log tells %q", log)
	}
	// What can't be opened is told of, but not each time.
	if err := os.WriteFile(filepath.Join(dir, "locked"), make([]byte, 512), 0o600); err != nil {
		t.Fatal(err)
	}
	other, err := file.Open(filepath.Join(dir, "locked"), file.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for range 50 {
		if e, _ := s.Lookup("i/locked"); e != nil {
			t.Error("an image that somebody else has is served")
		}
	}
	other.Close()
	if got := strings.Count(log.String(), "in use"); got != quotaRecords {
		t.Errorf("the log tells %d times of an image that is in use: %s", got, log)
	}
	load(t, s, Offer{Hidden: true, Exports: []Definition{inMemory("m", 1)}})
	s.List(func(name, _ string) bool { t.Errorf("%s is hidden, and listed", name); return true })
}

// TestFolderManyClients has clients come and go at once, each of whom gets the image: never does
// one that is just being closed keep the next from opening it.
func TestFolderManyClients(t *testing.T) {
	dir := t.TempDir()
	s, log := newSet(t)
	image(t, dir, "a", 4096)
	load(t, s, Offer{Folders: []Folder{{Path: dir, Template: Definition{Spec: host.Spec{Kind: "file"}}}}})
	failed := make(chan error, 8)
	for range cap(failed) {
		go func() {
			for i := range 200 {
				e, done := s.Lookup("a")
				if e == nil {
					failed <- fmt.Errorf("round %d: no export", i)
					return
				}
				if err := e.Sync(context.Background()); err != nil {
					failed <- err
					return
				}
				done()
			}
			failed <- nil
		}()
	}
	for range cap(failed) {
		if err := <-failed; err != nil {
			t.Error(err)
		}
	}
	if log.String() != "" {
		t.Errorf("the log tells %s", log)
	}
}
