package file

// Name returns the path that the file was opened with.
func (f *File) Name() string { return f.path }

// AlignedMemory returns n bytes at an address that is a multiple of align.
func AlignedMemory(n int, align uintptr) []byte { return alignedMemory(n, align) }

// WithoutSupport makes f one of a file system that can do as little as possible.
func (f *File) WithoutSupport() {
	f.punch.missing.Store(true)
	f.zeroRange.missing.Store(true)
	f.discard.missing.Store(true)
	f.durable.noFUA = true
}
