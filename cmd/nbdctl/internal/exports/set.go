// Package exports has what a server offers: one export of the command line, or those that a file
// defines, which can be read again while clients are served.
package exports

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"slices"
	"sync"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/kind"
	"github.com/nbdctl/nbdctl/server"
)

// A Set is what a server offers now. What the file defines one by one is open all the time, for
// memory would forget what is in it; an image of a folder is while clients have it. Safe for
// concurrent use.
type Set struct {
	log     io.Writer
	logger  *slog.Logger   // writes to it
	closing sync.WaitGroup // of entries that their last client has left

	mu     sync.Mutex // guards all below, and held while an Offer is loaded
	offer  Offer
	fixed  map[string]*entry
	images map[string]*entry // of folders, in use
}

// New returns a set that offers nothing yet, and whose log goes to w, which is safe for concurrent
// use.
func New(w io.Writer) *Set {
	return &Set{
		log: w, logger: slog.New(slog.NewTextHandler(w, nil)),
		fixed: make(map[string]*entry), images: make(map[string]*entry),
	}
}

// Load has the set offer o in place of what it did. An export that is defined as before stays as it
// is. One that is not any more goes when its last client has. When something cannot be opened,
// nothing changes; warnings are of what was.
func (s *Set) Load(o Offer) (warnings []string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	next := make(map[string]*entry)
	var gone, closed, opened []*entry
	for _, e := range s.fixed {
		if i := slices.IndexFunc(o.Exports, func(d Definition) bool { return d.equal(&e.def) }); i >= 0 {
			next[e.def.Name] = e
		} else {
			gone = append(gone, e)
		}
	}
	// An image that nobody uses must not be in the way of its own new definition.
	for _, e := range gone {
		if e.users == 0 && kind.TakesPath(e.def.Spec.Kind) {
			err = errors.Join(err, e.close())
			closed = append(closed, e)
		}
	}
	for _, d := range o.Exports {
		if next[d.Name] != nil || err != nil {
			continue
		}
		e := &entry{def: d}
		if err = e.open(s.log); err == nil {
			next[d.Name] = e
			opened = append(opened, e)
			warnings = append(warnings, e.backing.Warnings...)
		}
	}
	if err != nil {
		for _, e := range opened {
			err = errors.Join(err, e.discard())
		}
		for _, e := range closed {
			again := e.open(s.log)
			if again != nil {
				delete(s.fixed, e.def.Name)
			}
			err = errors.Join(err, again)
		}
		return nil, err
	}
	for _, e := range gone {
		e.transient = true
		if e.users == 0 {
			s.closed(e)
		}
	}
	s.offer, s.fixed = o, next
	return warnings, nil
}

// closed closes what nobody uses any more. What goes wrong is told in the log alone.
func (s *Set) closed(e *entry) {
	if err := e.close(); err != nil {
		s.logger.Error("export could not be closed in order", slog.Any("err", err))
	}
}

// Lookup is Server.Lookup.
func (s *Set) Lookup(name string) (*server.Export, func()) {
	s.mu.Lock()
	if name == "" && s.offer.Default != "" {
		name = s.offer.Default
	}
	if e := s.fixed[name]; e != nil {
		e.users++
		s.mu.Unlock()
		return e.export, func() { s.leave(e) }
	}
	var def Definition
	found := false
	for i := range s.offer.Folders {
		if def, found = s.offer.Folders[i].find(name); found {
			break
		}
	}
	s.mu.Unlock()
	if !found {
		return nil, nil
	}
	e, err := s.image(def)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			s.logger.Warn("export is not available", slog.String("export", name), slog.Any("err", err))
		}
		return nil, nil
	}
	return e.export, func() { s.leave(e) }
}

// image opens an image of a folder, or finds that it is open, and counts its user.
func (s *Set) image(def Definition) (*entry, error) {
	for {
		now, err := os.Stat(def.Spec.Arg)
		if err != nil {
			return nil, err
		}
		if m := now.Mode().Type(); m != 0 && m != fs.ModeDevice {
			return nil, fmt.Errorf("%s is neither a regular file nor a block device", def.Spec.Arg)
		}
		s.mu.Lock()
		e := s.images[def.Name]
		if e != nil && e.users == 0 { // It is being closed, and would be in the way.
			s.mu.Unlock()
			<-e.closed
			continue
		}
		if e != nil && e.def.equal(&def) && os.SameFile(e.file, now) {
			e.users++
			s.mu.Unlock()
			<-e.ready
			if e.err != nil {
				s.leave(e)
			}
			return e, e.err
		}
		// Another file has the name now. The one before serves those who have it.
		e = &entry{
			def: def, file: now, transient: true, users: 1,
			ready: make(chan struct{}), closed: make(chan struct{}),
		}
		s.images[def.Name] = e
		s.mu.Unlock()
		e.err = e.open(s.log)
		close(e.ready)
		if e.err != nil {
			s.leave(e)
		}
		return e, e.err
	}
}

// leave counts a user less. The last one of what is not to stay closes it, without waiting.
func (s *Set) leave(e *entry) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e.users--
	if e.users > 0 || !e.transient {
		return
	}
	s.closing.Go(func() {
		s.closed(e)
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.images[e.def.Name] == e {
			delete(s.images, e.def.Name)
		}
		if e.closed != nil {
			close(e.closed)
		}
	})
}

// List is Server.List: what is defined one by one, then what lies in the folders, each in the order
// of the names.
func (s *Set) List(yield func(name, description string) bool) {
	s.mu.Lock()
	o := s.offer
	s.mu.Unlock()
	if o.Hidden {
		return
	}
	listed := make(map[string]bool)
	offer := func(d *Definition) bool {
		if listed[d.Name] {
			return true
		}
		listed[d.Name] = true
		return yield(d.Name, d.Description)
	}
	for _, d := range slices.SortedFunc(slices.Values(o.Exports), byName) {
		if !offer(&d) {
			return
		}
	}
	for _, f := range o.Folders {
		files, err := os.ReadDir(f.Path) // in the order of the names
		if err != nil {
			s.logger.Warn("folder of exports can't be read", slog.Any("err", err))
			continue
		}
		for _, file := range files {
			d, ok := f.find(f.Prefix + file.Name())
			if !ok || file.IsDir() {
				continue
			}
			if !offer(&d) {
				return
			}
		}
	}
}

// Names are those of the exports that are defined one by one, the default one first.
func (s *Set) Names() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var names []string
	if s.fixed[s.offer.Default] != nil {
		names = append(names, s.offer.Default)
	}
	for _, name := range slices.Sorted(maps.Keys(s.fixed)) {
		if name != s.offer.Default {
			names = append(names, name)
		}
	}
	return names
}

// Status tells of the exports that are open, in the order of their names.
func (s *Set) Status() []host.ExportStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []host.ExportStatus
	for _, open := range []map[string]*entry{s.fixed, s.images} {
		for _, name := range slices.Sorted(maps.Keys(open)) {
			if st, ok := open[name].status(); ok {
				all = append(all, st)
			}
		}
	}
	return all
}

// Close makes everything durable and closes it. No client has anything of it any more.
func (s *Set) Close() error {
	s.closing.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	var err error
	for _, name := range slices.Sorted(maps.Keys(s.fixed)) {
		err = errors.Join(err, s.fixed[name].close())
	}
	s.fixed, s.offer = nil, Offer{}
	return err
}

// Discard closes everything, and removes what was made for it: the server has never begun.
func (s *Set) Discard() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var err error
	for _, e := range s.fixed {
		err = errors.Join(err, e.discard())
	}
	s.fixed, s.offer = nil, Offer{}
	return err
}
