package main

import (
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"github.com/nbdctl/nbdctl/backends/nbd"
)

// copyAll reads all of an export in blocks, and writes them to another one unless that is nil.
func copyAll(from, to *nbd.Client, o options) error {
	if to != nil && to.Size() < from.Size() {
		return fmt.Errorf("%d bytes do not fit into %d", from.Size(), to.Size())
	}
	var next atomic.Int64
	var failed atomic.Pointer[error]
	var all sync.WaitGroup
	for range o.depth * o.connections {
		all.Go(func() {
			p := make([]byte, o.block)
			for failed.Load() == nil {
				off := next.Add(int64(len(p))) - int64(len(p))
				if off >= from.Size() {
					return
				}
				if err := copyBlock(from, to, p, off); err != nil {
					failed.Store(&err)
				}
			}
		})
	}
	all.Wait()
	if err := failed.Load(); err != nil {
		return *err
	}
	return nil
}

func copyBlock(from, to *nbd.Client, p []byte, off int64) error {
	n, err := from.ReadAt(p, off)
	if err == io.EOF && n > 0 {
		err = nil // It is the end of the export.
	}
	if err == nil && to != nil {
		_, err = to.WriteAt(p[:n], off)
	}
	return err
}
