package kind

import (
	"context"

	"github.com/nbdctl/nbdctl/backends/memory"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/quantity"
)

var memoryKind = Kind{
	Name:     "memory",
	Synopsis: "memory",
	Summary:  "a sparse RAM disk; needs --size; -o limit=SIZE bounds the memory it takes",
	Options:  []string{"limit"},
	Check: func(s host.Spec) error {
		switch {
		case s.Arg != "":
			return exit.Usagef("memory takes no argument, got %q", s.Arg)
		case s.Create:
			return exit.Usagef("--create: memory is always new; leave it out")
		case s.Size == 0:
			return exit.Usagef("memory needs --size, for example --size 512M")
		}
		_, err := memoryLimit(s)
		return err
	},
	Open: func(_ context.Context, s host.Spec, _ bool) (*host.Backing, error) {
		limit, err := memoryLimit(s)
		if err != nil {
			return nil, err
		}
		m, err := memory.New(s.Size, memory.Options{Limit: limit})
		if err != nil {
			return nil, err
		}
		return memoryBacking(m), nil
	},
	Inherit: func(_ context.Context, s host.Spec, i host.Inheritance) (*host.Backing, error) {
		limit, err := memoryLimit(s)
		if err != nil {
			i.Close()
			return nil, err
		}
		m, err := memory.Inherit(i.Size, i.Files, memory.Options{Limit: limit})
		if err != nil {
			return nil, err
		}
		return memoryBacking(m), nil
	},
}

func memoryBacking(m *memory.Memory) *host.Backing {
	keep := func() (host.Kept, error) { return kept(m.Files()) }
	return &host.Backing{Backend: m, Close: m.Close, Keep: keep, HandOver: func() (*host.Handed, error) {
		files, err := m.Files()
		if err != nil {
			return nil, err
		}
		closeAll := func() {
			for _, f := range files {
				f.Close()
			}
		}
		return &host.Handed{Files: files, Resume: closeAll, Leave: func() error {
			closeAll()
			return m.Leave()
		}}, nil
	}}
}

// memoryLimit is the value of -o limit, 0 if there is none.
func memoryLimit(s host.Spec) (int64, error) {
	v, ok := option(s, "limit")
	if !ok {
		return 0, nil
	}
	n, err := quantity.ParseSize(v)
	if err != nil || n == 0 {
		return 0, exit.Usagef("-o limit=%s: must be a size above zero, for example 4G", v)
	}
	return n, nil
}
