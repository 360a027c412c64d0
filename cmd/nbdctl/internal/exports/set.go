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

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/kind"
	"github.com/nbdctl/nbdctl/server"
)

// A Set is what a server offers now. What the file defines one by one is open all the time, for
// memory would forget what is in it; an image of a folder is while clients have it. Safe for
// concurrent use.
type Set struct {
	log    io.Writer
	logger *slog.Logger // writes to it
	quota  quota        // of what clients can have logged

	loading sync.Mutex // held while an Offer is loaded

	mu      sync.Mutex // guards all below
	offer   Offer
	fixed   map[string]*entry
	images  map[string]*entry   // of folders, in use
	old     map[*entry]struct{} // not offered any more, in use
	leaving map[*entry]struct{} // left by their last client, and not closed yet
	failed  []error             // of those that could not be closed in order
	idle    chan struct{}       // unless nil, closed when nothing is leaving any more
	kept    bool                // what is left stays open
	left    bool                // another process has it all

	inherited []*entry // from another process, as it has counted them
}

// New returns a set that offers nothing yet, and whose log goes to w, which is safe for concurrent
// use.
func New(w io.Writer) *Set {
	return &Set{
		log: w, logger: slog.New(slog.NewTextHandler(w, nil)),
		fixed: make(map[string]*entry), images: make(map[string]*entry),
		old: make(map[*entry]struct{}), leaving: make(map[*entry]struct{}),
	}
}

// Load has the set offer o in place of what it did. An export that is defined as before stays as it
// is, but for its description. One that is not any more goes when its last client has, and its
// image can't be in another definition before. When something cannot be opened, what was offered
// stays; an image that has gone meanwhile is told of. Warnings are of what was opened.
func (s *Set) Load(o Offer) (warnings []string, err error) {
	s.loading.Lock()
	defer s.loading.Unlock()
	if s.isLeft() {
		return nil, errors.New("another process has what is offered")
	}
	next, gone, inTheWay, err := s.compare(o)
	if err != nil {
		return nil, err
	}
	for _, e := range inTheWay {
		err = errors.Join(err, e.close())
	}
	var opened []*entry
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
		return nil, errors.Join(err, s.restore(inTheWay))
	}
	s.mu.Lock()
	s.offer, s.fixed = o, next
	var unused []*entry
	for _, d := range o.Exports {
		next[d.Name].describe(d.Description)
	}
	for _, e := range gone {
		e.transient = true
		if next[e.def.Name] != nil && kind.Forgets(e.def.Spec.Kind) {
			warnings = append(warnings, fmt.Sprintf("export %q is defined anew: new clients find it empty", e.def.Name))
		}
		if e.users == 0 {
			unused = append(unused, e)
		} else {
			s.old[e] = struct{}{}
		}
	}
	s.mu.Unlock()
	for _, e := range unused {
		s.note(e.close())
	}
	return warnings, nil
}

// isLeft reports whether another process has it all.
func (s *Set) isLeft() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.left
}

// compare finds what of o is there already, and what is there that is not in o. An image that o has
// in another definition is in the way: if nobody uses it, it is taken from what is offered.
func (s *Set) compare(o Offer) (next map[string]*entry, gone, inTheWay []*entry, err error) {
	next = make(map[string]*entry)
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range s.fixed {
		if slices.ContainsFunc(o.Exports, func(d Definition) bool { return d.same(&e.def) }) {
			next[e.def.Name] = e
			continue
		}
		if wanted := slices.ContainsFunc(o.Exports, e.sharesImage); !wanted {
			gone = append(gone, e)
		} else if e.users > 0 {
			err = errors.Join(err, fmt.Errorf("export %q: clients have it as it was defined before (%d); "+
				"define it anew when they have left", e.def.Name, e.users))
		} else {
			inTheWay = append(inTheWay, e)
		}
	}
	for e := range s.leaving {
		if slices.ContainsFunc(o.Exports, e.sharesImage) {
			err = errors.Join(err, fmt.Errorf("export %q, as it was defined before, is just being closed; try again",
				e.def.Name))
		}
	}
	if err == nil {
		for _, e := range inTheWay {
			delete(s.fixed, e.def.Name)
		}
	}
	return next, gone, inTheWay, err
}

// restore offers again what was in the way of something that has failed.
func (s *Set) restore(entries []*entry) error {
	var err error
	for _, e := range entries {
		if again := e.open(s.log); again != nil {
			err = errors.Join(err, fmt.Errorf("it is not offered any more, as it was before: %w", again))
			continue
		}
		s.mu.Lock()
		s.fixed[e.def.Name] = e
		s.mu.Unlock()
	}
	return err
}

// note keeps an error of closing something, which Close returns.
func (s *Set) note(err error) {
	if err == nil {
		return
	}
	s.logger.Error("export could not be closed in order", slog.Any("err", err))
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failed = append(s.failed, err)
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
		if !errors.Is(err, fs.ErrNotExist) && s.quota.take() {
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
			return nil, fs.ErrNotExist // A folder in the folder, say.
		}
		s.mu.Lock()
		before := s.images[def.Name]
		if before != nil && before.closing { // It would be in the way.
			s.mu.Unlock()
			<-before.closed
			continue
		}
		if before != nil && before.def.same(&def) && os.SameFile(before.file, now) {
			before.users++
			before.describe(def.Description)
			s.mu.Unlock()
			<-before.ready
			if before.err != nil {
				s.leave(before)
			}
			return before, before.err
		}
		// Another file has the name now. The one before serves those who have it.
		if before != nil {
			s.old[before] = struct{}{}
		}
		e := &entry{
			def: def, file: now, transient: true, users: 1,
			ready: make(chan struct{}), closed: make(chan struct{}),
		}
		s.images[def.Name] = e
		s.mu.Unlock()
		e.err = e.open(s.log)
		if after, err := os.Stat(def.Spec.Arg); e.err == nil && (err != nil || !os.SameFile(now, after)) {
			e.err = fmt.Errorf("%s was replaced just now", def.Spec.Arg)
		}
		if e.err != nil {
			s.mu.Lock()
			if before != nil && !before.closing && s.images[def.Name] == e {
				s.images[def.Name] = before
			}
			s.mu.Unlock()
		}
		close(e.ready)
		if e.err != nil {
			s.leave(e)
		}
		return e, e.err
	}
}

// leave counts a user less. What the last one of what is not to stay has written is made durable
// without waiting, and then, if there is no user again, it is closed.
func (s *Set) leave(e *entry) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e.users--
	s.unused(e)
}

// unused has an entry closed that nobody uses, unless it is to stay. The caller holds mu.
func (s *Set) unused(e *entry) {
	if e.users > 0 || !e.transient || s.kept {
		return
	}
	if _, already := s.leaving[e]; already {
		return
	}
	s.leaving[e] = struct{}{}
	go s.part(e)
}

// part lets go of what its last user has left.
func (s *Set) part(e *entry) {
	s.note(e.sync())
	s.mu.Lock()
	e.closing = e.users == 0
	s.mu.Unlock()
	if e.closing {
		s.note(e.close())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !e.closing && e.users == 0 { // It was left again just now.
		go s.part(e)
		return
	}
	delete(s.leaving, e)
	if s.idle != nil && len(s.leaving) == 0 {
		close(s.idle)
		s.idle = nil
	}
	if !e.closing {
		return
	}
	if s.images[e.def.Name] == e {
		delete(s.images, e.def.Name)
	}
	delete(s.old, e)
	if e.closed != nil {
		close(e.closed)
	}
}

// Close makes everything durable, and closes it, but for images that a client still has: its
// requests hang. The error has also what went wrong before, when others were closed.
func (s *Set) Close() error {
	s.settle()
	s.mu.Lock()
	defer s.mu.Unlock()
	err := errors.Join(s.failed...)
	for _, name := range slices.Sorted(maps.Keys(s.fixed)) {
		err = errors.Join(err, s.fixed[name].close())
	}
	for _, name := range slices.Sorted(maps.Keys(s.images)) {
		err = errors.Join(err, s.images[name].sync())
	}
	s.fixed, s.offer = nil, Offer{}
	return err
}

// settle waits until nothing is leaving.
func (s *Set) settle() {
	s.mu.Lock()
	if len(s.leaving) == 0 {
		s.mu.Unlock()
		return
	}
	if s.idle == nil {
		s.idle = make(chan struct{})
	}
	idle := s.idle
	s.mu.Unlock()
	<-idle
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
