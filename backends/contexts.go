package backends

// A Contexter tells more of its ranges than what is stored where (Extenter): which of them have
// changed since a backup, for example, as the dirty bitmaps of QEMU do. NBD clients ask for it by
// the name of a meta context ("Metadata querying" of the protocol document).
type Contexter interface {
	// Contexts lists the contexts, at most MaxContexts. They do not change while the backend is in
	// use, because clients choose among them once.
	Contexts() []Context

	// ContextExtents is Extents for one of them, by its name. Pieces begin and end at multiples of
	// the block size that the backend is served with; of a block that has several pieces the first
	// one counts.
	ContextExtents(name string, off, n int64, yield func(Mark) bool) error
}

// MaxContexts is how many contexts a backend may have.
const MaxContexts = 15

// A Context is something that a backend knows of its ranges.
type Context struct {
	// Name is a namespace, a colon, and whatever the namespace has behind it, such as
	// "example.com:changed". It is UTF-8 without zero bytes, and at most 4096 bytes long. The
	// namespace "base" belongs to the protocol; unregistered ones begin with "x-".
	Name string
	// Wide tells that flags can have more than 32 bits. Only clients with extended headers can
	// choose the context then.
	Wide bool
}

// A Mark is a piece of a backend that is alike in one context.
type Mark struct {
	Offset int64  // in bytes from the start of the backend
	Length int64  // in bytes, at least 1
	Flags  uint64 // whatever the context makes of them; below 2³² unless it is Wide
}
