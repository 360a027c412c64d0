package backendtest_test

import (
	"slices"
	"sync"
	"testing"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/backendtest"
)

// A MyBackend is what is to be tested: bytes in memory, of which a crash leaves what was synced.
type MyBackend struct {
	mu     sync.RWMutex // guards data and stable
	data   []byte
	stable []byte
}

func NewMyBackend(size int) *MyBackend {
	return &MyBackend{data: make([]byte, size), stable: make([]byte, size)}
}

func (b *MyBackend) Size() int64 { return int64(len(b.data)) }

func (b *MyBackend) ReadAt(p []byte, off int64) (int, error) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	return copy(p, b.data[off:]), nil
}

func (b *MyBackend) WriteAt(p []byte, off int64) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return copy(b.data[off:], p), nil
}

func (b *MyBackend) Sync() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	copy(b.stable, b.data)
	return nil
}

func (b *MyBackend) Trim(off, n int64) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	clear(b.data[off:][:n])
	return nil
}

// crash returns what is found after a crash.
func (b *MyBackend) crash() *MyBackend {
	b.mu.RLock()
	defer b.mu.RUnlock()
	return &MyBackend{data: slices.Clone(b.stable), stable: slices.Clone(b.stable)}
}

// TestMyBackend is all that a backend needs for the kit. Run it with -race, too. A failure names
// the request, and the log has the seed, with which Options.Seed repeats it.
func TestMyBackend(t *testing.T) {
	// Sizes worth a try: a few bytes, one that is no multiple of anything, and more than 4 MiB,
	// of which the kit uses both ends.
	for _, size := range []int{1, 100_001, 5 << 20} {
		// Each check has a fresh one. What is to be closed goes to Cleanup of the argument.
		open := func(testing.TB) backends.Backend { return NewMyBackend(size) }
		backendtest.Test(t, open, backendtest.Options{
			TrimZeroes: true, // The contract does not ask for it; this backend promises it.
			// Without it durability is not tested.
			Reopen: func(_ testing.TB, b backends.Backend) backends.Backend {
				return b.(*MyBackend).crash()
			},
		})
	}
}
