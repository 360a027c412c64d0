// Package backendtest checks that a backend keeps the contract of package
// backends.
package backendtest

import (
	"testing"

	"github.com/nbdctl/nbdctl/backends"
)

// Options of Test.
type Options struct {
	Seed uint64
}

// Test runs the kit over the backends that open makes.
func Test(t *testing.T, open func(t testing.TB) backends.Backend, opts Options) {}
