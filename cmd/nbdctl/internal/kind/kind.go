// Package kind knows the backends that the command line can name: what each
// one needs, and how it is opened.
package kind

import (
	"slices"
	"strings"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
)

// A Kind is one backend that nbdctl serves.
type Kind struct {
	Name string
	// Synopsis is the kind with its argument, as typed.
	Synopsis string
	// Summary is one line of help.
	Summary string

	// takesPath tells that the argument is a path.
	takesPath bool
	// options are the keys that -o takes.
	options []string
	// check refuses a spec that can be valid on no machine.
	check func(host.Spec) error
	// open opens the backend for devices, or for exports, which end at any byte.
	open func(s host.Spec, export bool) (*host.Backing, error)
}

// All lists the kinds in the order of the help text.
var All = []Kind{memoryKind, fileKind}

// find returns the kind called name.
func find(name string) (Kind, error) {
	for _, k := range All {
		if k.Name == name {
			return k, nil
		}
	}
	return Kind{}, exit.Usagef("unknown backend %q: the backends are %s", name, names())
}

func names() string {
	var s []string
	for _, k := range All {
		s = append(s, k.Name)
	}
	return strings.Join(s, ", ")
}

// Check refuses a spec that could not be served on any machine, before
// anything is touched. Its errors are usage errors.
func Check(s host.Spec) error {
	if s.Kind == "" {
		return exit.Usagef("no backend named: the backends are %s", names())
	}
	k, err := find(s.Kind)
	if err != nil {
		return err
	}
	for _, o := range s.Options {
		key, _, ok := strings.Cut(o, "=")
		switch {
		case !ok:
			return exit.Usagef("-o %s: must be key=value", o)
		case len(k.options) == 0:
			return exit.Usagef("-o %s: %s takes no options", o, k.Name)
		case !slices.Contains(k.options, key):
			return exit.Usagef("-o %s: %s has no option %q, only %s", o, k.Name, key, strings.Join(k.options, ", "))
		}
	}
	return k.check(s)
}

// Open opens the backend of s for the process that serves a device.
func Open(s host.Spec) (*host.Backing, error) { return open(s, false) }

// OpenExport opens the backend of s for NBD clients. Unless s has a block size, it is
// taken to the byte, and an object without any is one, too.
func OpenExport(s host.Spec) (*host.Backing, error) { return open(s, true) }

func open(s host.Spec, export bool) (*host.Backing, error) {
	k, err := find(s.Kind)
	if err != nil {
		return nil, err
	}
	return k.open(s, export)
}

// option returns the last value given for key.
func option(s host.Spec, key string) (string, bool) {
	for _, o := range slices.Backward(s.Options) {
		if k, v, _ := strings.Cut(o, "="); k == key {
			return v, true
		}
	}
	return "", false
}

// TakesPath tells whether the argument of the kind called name is a path.
func TakesPath(name string) bool {
	k, err := find(name)
	return err == nil && k.takesPath
}
