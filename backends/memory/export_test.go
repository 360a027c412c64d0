package memory

// NewOnHeap is New with the store of systems without memfd.
func NewOnHeap(size int64, opts Options) (*Memory, error) {
	s, err := newHeapStore(size, newLimit(opts.Limit))
	if err != nil {
		return nil, err
	}
	return newMemory(size, s), nil
}
