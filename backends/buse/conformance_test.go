package buse_test

import (
	"fmt"
	"sync"
	"testing"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/backendtest"
	"github.com/nbdctl/nbdctl/backends/buse"
)

// A driver does all that a driver of buse-go can get away with. It has no lock, relies on the zeros
// in the buffer of a read, changes the data of a write, and goes on using both buffers later.
type driver struct {
	data   []uint16 // each byte inverted, and stored; 0: never written
	stable []uint16 // what of it outlives a crash
	kept   []byte
}

// stored is a bit that tells a byte from one that was never written.
const stored = 1 << 8

func newDriver(size int) *driver {
	return &driver{data: make([]uint16, size), stable: make([]uint16, size)}
}

func (d *driver) ReadAt(p []byte, off uint) error {
	d.keep(p)
	for i, c := range d.data[off:][:len(p)] {
		if c != 0 {
			p[i] = ^byte(c)
		}
	}
	return nil
}

func (d *driver) WriteAt(p []byte, off uint) error {
	d.keep(p)
	for i := range p {
		p[i] = ^p[i]
		d.data[int(off)+i] = stored | uint16(p[i])
	}
	return nil
}

// keep spoils the buffer of the call before.
func (d *driver) keep(p []byte) {
	for i := range d.kept {
		d.kept[i] = 0xee
	}
	d.kept = p
}

func (d *driver) Flush() error {
	copy(d.stable, d.data)
	return nil
}

func (d *driver) Trim(off, length uint) error {
	clear(d.data[off:][:length])
	return nil
}

func (d *driver) Disconnect() {}

func (d *driver) crash() { copy(d.data, d.stable) }

// A polite driver keeps the rules of package backends.
type polite struct {
	mu sync.Mutex // guards driver
	driver
}

func (d *polite) ReadAt(p []byte, off uint) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, c := range d.data[off:][:len(p)] {
		p[i] = byte(c)
	}
	return nil
}

func (d *polite) WriteAt(p []byte, off uint) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, c := range p {
		d.data[int(off)+i] = stored | uint16(c)
	}
	return nil
}

func (d *polite) Flush() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.driver.Flush()
}

func (d *polite) Trim(off, length uint) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.driver.Trim(off, length)
}

func TestConformance(t *testing.T) {
	type crasher interface {
		buse.Driver
		crash()
	}
	for _, tt := range []struct {
		name      string
		newDriver func(size int) crasher
		open      func(buse.Driver, int64) (*buse.Backend, error)
	}{
		{"New", func(size int) crasher { return newDriver(size) }, buse.New},
		{"NewConcurrent", func(size int) crasher { return &polite{driver: *newDriver(size)} }, buse.NewConcurrent},
	} {
		for _, size := range []int{1, 4095, 5<<20 + 513} {
			t.Run(fmt.Sprint(tt.name, size), func(t *testing.T) {
				var d crasher
				open := func(t testing.TB) backends.Backend {
					b, err := tt.open(d, int64(size))
					if err != nil {
						t.Fatal(err)
					}
					return b
				}
				backendtest.Test(t, func(t testing.TB) backends.Backend {
					d = tt.newDriver(size)
					return open(t)
				}, backendtest.Options{
					TrimZeroes: true,
					Reopen: func(t testing.TB, _ backends.Backend) backends.Backend {
						d.crash()
						return open(t)
					},
				})
			})
		}
	}
}
