// Package kind knows the backends that the command line can name: what each
// one needs, and how it is opened.
package kind

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/secret"
)

// A Kind is one backend that nbdctl serves.
type Kind struct {
	Name string
	// Synopsis is the kind with its argument, as typed.
	Synopsis string
	// Summary is one line of help.
	Summary string

	// TakesPath tells that the argument is a path.
	TakesPath bool
	// Options are the keys that -o takes.
	Options []string
	// Secrets are those of them whose values are secret: the user types a reference, and open finds
	// the value in the Secrets of the spec.
	Secrets []string
	// Check refuses a spec that can be valid on no machine.
	Check func(host.Spec) error
	// Open opens the backend for devices, or for exports, which end at any byte.
	Open func(ctx context.Context, s host.Spec, export bool) (*host.Backing, error)
	// Inherit goes on with the backend of a device that another process has handed over; nil: none
	// does.
	Inherit func(ctx context.Context, s host.Spec, i host.Inheritance) (*host.Backing, error)
}

// All lists the kinds in the order of the help text.
var All = []Kind{memoryKind, fileKind, nbdKind}

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
		key, value, ok := strings.Cut(o, "=")
		if ok && len(k.Secrets) != 0 && !slices.Contains(k.Options, key) {
			o = key + "=" + secret.Hidden // It may be a secret with a misspelt key.
		}
		switch {
		case !ok:
			return exit.Usagef("-o %s: must be key=value", o)
		case len(k.Options) == 0:
			return exit.Usagef("-o %s: %s takes no options", o, k.Name)
		case !slices.Contains(k.Options, key):
			return exit.Usagef("-o %s: %s has no option %q, only %s", o, k.Name, key, strings.Join(k.Options, ", "))
		case slices.Contains(k.Secrets, key):
			if _, err := secret.ParseReference(value); err != nil {
				return exit.Usagef("-o %s: %w", key, err)
			}
		}
	}
	return k.Check(s)
}

// ReadSecrets returns a spec that has the secrets to which its options refer. The spec has passed
// Check.
func ReadSecrets(s host.Spec) (host.Spec, error) {
	k, err := find(s.Kind)
	if err != nil || len(k.Secrets) == 0 {
		return s, err
	}
	s.Secrets = make(secret.Set)
	for _, key := range k.Secrets {
		i := lastOption(s, key)
		if i < 0 {
			continue
		}
		_, typed, _ := strings.Cut(s.Options[i], "=")
		r, err := secret.ParseReference(typed)
		if err == nil {
			r, err = r.Absolute()
		}
		if err != nil {
			return s, fmt.Errorf("-o %s: %w", key, err)
		}
		s.Options = slices.Clone(s.Options)
		s.Options[i] = key + "=" + r.String()
		if s.Secrets[key], err = r.Read(host.Inherited); err != nil {
			return s, fmt.Errorf("-o %s: %w", key, err)
		}
	}
	return s, nil
}

// Open opens the backend of s for the process that serves a device.
func Open(ctx context.Context, s host.Spec) (*host.Backing, error) { return open(ctx, s, false) }

// OpenExport opens the backend of s for NBD clients. Unless s has a block size, it is
// taken to the byte, and an object without any is one, too.
func OpenExport(ctx context.Context, s host.Spec) (*host.Backing, error) { return open(ctx, s, true) }

// Inherit goes on with the backend of s that another process has handed over.
func Inherit(ctx context.Context, s host.Spec, i host.Inheritance) (*host.Backing, error) {
	k, err := find(s.Kind)
	if err == nil && k.Inherit == nil {
		err = exit.With(exit.Unsupported, "%s can't be handed over", s.Kind)
	}
	if err != nil {
		i.Close()
		return nil, err
	}
	b, err := k.Inherit(ctx, s, i)
	return b, s.Secrets.Redactor().Error(err)
}

func open(ctx context.Context, s host.Spec, export bool) (*host.Backing, error) {
	k, err := find(s.Kind)
	if err != nil {
		return nil, err
	}
	b, err := k.Open(ctx, s, export)
	return b, s.Secrets.Redactor().Error(err)
}

// option returns the last value given for key.
func option(s host.Spec, key string) (string, bool) {
	i := lastOption(s, key)
	if i < 0 {
		return "", false
	}
	_, v, _ := strings.Cut(s.Options[i], "=")
	return v, true
}

// lastOption is where the last value for key stands, which counts; -1 if there is none.
func lastOption(s host.Spec, key string) int {
	for i, o := range slices.Backward(s.Options) {
		if k, _, _ := strings.Cut(o, "="); k == key {
			return i
		}
	}
	return -1
}

// Forgets tells whether a backend of the kind called name is empty when it is opened.
func Forgets(name string) bool { return name == memoryKind.Name }

// TakesPath tells whether the argument of the kind called name is a path.
func TakesPath(name string) bool {
	k, err := find(name)
	return err == nil && k.TakesPath
}

// kept is what outlives a process of a backend that is nothing but files.
func kept(files []*os.File, err error) (host.Kept, error) { return host.Kept{Files: files}, err }
