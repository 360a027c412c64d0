//go:build !race

package blocksize_test

import (
	"testing"

	"github.com/nbdctl/nbdctl/backends"
)

// TestAllocs holds that requests allocate nothing.
func TestAllocs(t *testing.T) {
	d := newDisk(1<<20, backends.BlockSizes{Minimum: 32 << 10}, all)
	b := layer(t, d, 512)
	p := make([]byte, 40<<10)
	for name, do := range map[string]func() (int, error){
		"read":  func() (int, error) { return b.ReadAt(p, 512) },
		"write": func() (int, error) { return b.WriteAt(p, 512) },
	} {
		if n := testing.AllocsPerRun(100, func() {
			if n, err := do(); n != len(p) || err != nil {
				t.Fatal(name, n, err)
			}
		}); n != 0 {
			t.Errorf("a %s allocates %v times", name, n)
		}
	}
}
