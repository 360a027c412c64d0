// Package memory is a block device in memory.
package memory

import "errors"

// Options of New.
type Options struct {
	Limit int64 // bytes of memory; 0: what the machine can spare
}

// Memory is a sparse block device in memory.
type Memory struct{ size int64 }

func New(size int64, opts Options) (*Memory, error)             { return &Memory{size: size}, nil }
func (m *Memory) Size() int64                                   { return m.size }
func (m *Memory) Used() int64                                   { return 0 }
func (m *Memory) Close() error                                  { return nil }
func (m *Memory) ReadAt(p []byte, off int64) (n int, err error) { return 0, errors.ErrUnsupported }
