package exports

import (
	"log/slog"
	"maps"
	"os"
	"slices"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
)

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
			if s.quota.take() {
				s.logger.Warn("folder of exports can't be read", slog.Any("err", err))
			}
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
