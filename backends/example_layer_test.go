package backends_test

import (
	"errors"
	"fmt"
	"log"

	"github.com/nbdctl/nbdctl/backends"
)

// A Partition is a layer: a part of another backend, as a backend of its own.
//
// It lists its methods and does not embed the inner backend. An embedded one would lend the layer
// its own ReadAtTo, Zero or Resize, which know nothing of where the partition begins.
type Partition struct {
	inner       backends.Device // with its abilities sorted out, by Probe
	first, size int64
	readOnly    bool
}

// NewPartition returns the size bytes of b from first on. b must stay open for as long as it is
// used.
func NewPartition(b backends.Backend, first, size int64, readOnly bool) (*Partition, error) {
	p := &Partition{inner: backends.Probe(b), first: first, size: size, readOnly: readOnly}
	unit := int64(max(p.inner.BlockSizes.Minimum, 1))
	if first < 0 || size < 0 || first > b.Size()-size || first%unit != 0 || size%unit != 0 {
		return nil, errors.New("there is no such partition")
	}
	return p, nil
}

func (p *Partition) Size() int64 { return p.size }

// Ranges need no check here: whoever calls stays inside Size.

func (p *Partition) ReadAt(b []byte, off int64) (int, error) {
	return p.inner.ReadAt(b, p.first+off)
}

// The methods below are called only if Caps has their bits: the fields of inner are not nil then.

func (p *Partition) WriteAt(b []byte, off int64) (int, error) {
	return p.inner.WriterAt.WriteAt(b, p.first+off)
}

func (p *Partition) Trim(off, n int64) error { return p.inner.Trimmer.Trim(p.first+off, n) }
func (p *Partition) Sync() error             { return p.inner.Syncer.Sync() }

// Caps takes away what the inner backend can't do, and what a read-only partition is not to do:
// without CapWrite nothing is offered that changes content. Bits of methods that are not listed
// above count for nothing, so a server does without: it writes the zeros that Zero would make.
func (p *Partition) Caps() backends.Caps {
	caps := p.inner.Caps
	if p.readOnly {
		caps &^= backends.CapWrite
	}
	return caps
}

// BlockSizes has no bit in Caps: a layer without it would let requests through that inner refuses.
func (p *Partition) BlockSizes() backends.BlockSizes { return p.inner.BlockSizes }

// A layer around a backend offers what both of them can do.
func Example_layer() {
	disk := &Disk{data: make([]byte, 1<<20)} // It has WriteAt and Trim, and no Sync.
	for _, readOnly := range []bool{false, true} {
		part, err := NewPartition(disk, 512<<10, 256<<10, readOnly)
		if err != nil {
			log.Fatal(err)
		}
		dev := backends.Probe(part)
		fmt.Printf("%d bytes: %q\n", dev.Size(), dev.Caps)
	}
	// Output:
	// 262144 bytes: "write,trim"
	// 262144 bytes: ""
}
