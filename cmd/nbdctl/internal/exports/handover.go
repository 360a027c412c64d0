package exports

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"time"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/kind"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/secret"
	"github.com/nbdctl/nbdctl/server"
)

// A Handed is an export on its way to another process. It is plain data, written as JSON, beside
// the descriptors.
type Handed struct {
	Definition Definition `json:"definition"`
	// Secrets are those of the Spec, as secret.Set sends them.
	Secrets json.RawMessage `json:"secrets,omitempty"`
	// Fixed tells that it is offered now, and not just for those who have it.
	Fixed bool `json:"fixed,omitempty"`
	// Image tells that it is of a folder.
	Image     bool         `json:"image,omitempty"`
	Size      int64        `json:"size"`       // in bytes
	BlockSize int          `json:"block_size"` // in bytes
	Opened    time.Time    `json:"opened"`
	Stats     server.Stats `json:"stats"` // since then
	// Backend is host.Handed.State.
	Backend json.RawMessage `json:"backend,omitempty"`

	// Files are the descriptors of the backend.
	Files []*os.File `json:"-"`
	// Export is what serves it here.
	Export *server.Export `json:"-"`

	handed *host.Handed
}

// A Handover is a set on its way to another process. It ends with Resume or Leave.
type Handover struct {
	Offer Offer
	All   []*Handed

	set *Set
}

// HandOver gets all that is open ready for another process to go on with it. No client is served
// meanwhile, nor asks for an export. It waits until what was left is closed, or ctx ends. What is
// left from then on stays open until Resume.
func (s *Set) HandOver(ctx context.Context) (*Handover, error) {
	s.loading.Lock()
	if err := s.keep(ctx); err != nil {
		s.loading.Unlock()
		return nil, err
	}
	defer s.mu.Unlock()
	h := &Handover{Offer: s.offer, set: s}
	for _, e := range s.open() {
		handed, err := e.handOver()
		if err != nil {
			h.resume()
			s.loading.Unlock()
			return nil, e.error(err)
		}
		handed.Fixed, handed.Image = s.fixed[e.def.Name] == e, s.images[e.def.Name] == e
		h.All = append(h.All, handed)
	}
	return h, nil
}

// keep has nothing closed that is left from now on. With success it returns with mu locked.
func (s *Set) keep(ctx context.Context) error {
	for {
		settled := make(chan struct{})
		go func() {
			s.settle()
			close(settled)
		}()
		select {
		case <-settled:
		case <-ctx.Done():
			return fmt.Errorf("an export that was left is not closed yet: %w", context.Cause(ctx))
		}
		s.mu.Lock()
		if len(s.leaving) == 0 {
			s.kept = true
			return nil
		}
		s.mu.Unlock() // Another one was left just now.
	}
}

// open returns all that is, in a fixed order. The caller holds mu.
func (s *Set) open() []*entry {
	var all []*entry
	for _, some := range []map[string]*entry{s.fixed, s.images} {
		for _, name := range slices.Sorted(maps.Keys(some)) {
			if some[name].backing != nil {
				all = append(all, some[name])
			}
		}
	}
	for e := range s.old {
		if !slices.Contains(all, e) && e.backing != nil {
			all = append(all, e)
		}
	}
	return all
}

func (e *entry) handOver() (*Handed, error) {
	if e.backing.HandOver == nil {
		return nil, fmt.Errorf("%s can't be handed over", e.def.Spec.Kind)
	}
	backend, err := e.backing.HandOver()
	if err != nil {
		return nil, err
	}
	h := &Handed{
		Definition: e.def, Size: e.export.Size(), BlockSize: e.export.BlockSize(), Opened: e.opened, Stats: e.stats(),
		Backend: backend.State, Files: backend.Files, Export: e.export, handed: backend,
	}
	if len(e.def.Spec.Secrets) != 0 {
		var b bytes.Buffer
		if err := e.def.Spec.Secrets.Send(&b); err != nil {
			backend.Resume()
			return nil, err
		}
		h.Secrets = b.Bytes()
	}
	return h, nil
}

// Resume has the set go on here, as if nothing had been.
func (h *Handover) Resume() {
	h.set.mu.Lock()
	h.resume()
	h.set.mu.Unlock()
	h.set.loading.Unlock()
}

// resume is Resume for who holds mu.
func (h *Handover) resume() {
	s := h.set
	s.kept = false
	for _, e := range h.All {
		e.handed.Resume()
	}
	for _, e := range s.open() {
		s.unused(e)
	}
}

// Leave gives the set up here: another process has it. Nothing is offered any more, and what
// clients leave is closed by nobody.
func (h *Handover) Leave() error {
	s := h.set
	s.mu.Lock()
	s.left = true
	s.fixed, s.images, s.offer = nil, nil, Offer{}
	s.mu.Unlock()
	var errs []error
	for _, e := range h.All {
		errs = append(errs, e.handed.Leave())
	}
	s.loading.Unlock()
	return errors.Join(errs...)
}

// grace is how long an image stays open for clients over TLS: they had it in the process before,
// and have to connect anew.
const grace = 10 * time.Second

// Inherit has a set that offers nothing yet go on with what another process has handed over. In
// case of an error that process has it still: nothing was closed that would take its content along,
// and this process is to end.
func (s *Set) Inherit(ctx context.Context, o Offer, all []*Handed) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, h := range all {
		e := &entry{def: h.Definition, opened: h.Opened, before: h.Stats, transient: !h.Fixed}
		if err := e.inherit(ctx, s.log, h); err != nil {
			return err
		}
		switch {
		case h.Fixed:
			s.fixed[e.def.Name] = e
		case h.Image:
			s.images[e.def.Name] = e
		default:
			s.old[e] = struct{}{}
		}
		if e.transient {
			e.users++ // until Begin
		}
		s.inherited = append(s.inherited, e)
	}
	s.offer = o
	return nil
}

// Begin tells that nobody else has what was inherited any more. What no client has is closed then,
// after a while.
func (s *Set) Begin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range s.inherited {
		if e.transient {
			time.AfterFunc(grace, func() { s.leave(e) })
		}
	}
}

// inherit is open, of what another process had open.
func (e *entry) inherit(ctx context.Context, log io.Writer, h *Handed) (err error) {
	i := host.Inheritance{State: h.Backend, Files: h.Files, Size: h.Size, BlockSize: h.BlockSize, Export: true}
	if h.Secrets != nil {
		if e.def.Spec.Secrets, err = secret.Receive(bytes.NewReader(h.Secrets)); err != nil {
			i.Close()
			return e.error(err)
		}
	}
	if h.Image {
		if err := e.image(h.Files); err != nil {
			i.Close()
			return e.error(err)
		}
	}
	if e.backing, err = kind.Inherit(ctx, e.def.Spec, i); err != nil {
		return e.error(err)
	}
	return e.offer(log)
}

// image notes that the entry is an open image of a folder.
func (e *entry) image(files []*os.File) (err error) {
	if len(files) != 1 {
		return fmt.Errorf("an image with %d descriptors", len(files))
	}
	e.ready, e.closed = make(chan struct{}), make(chan struct{})
	close(e.ready)
	e.file, err = files[0].Stat()
	return err
}

// LookupOf is a Server.Lookup that returns the export which was number i of what was inherited,
// whatever name is asked for.
func (s *Set) LookupOf(i int) func(string) (*server.Export, func()) {
	return func(string) (*server.Export, func()) {
		s.mu.Lock()
		defer s.mu.Unlock()
		e := s.inherited[i]
		e.users++
		return e.export, func() { s.leave(e) }
	}
}
