package memory

import (
	"fmt"
	"sync"
	"syscall"
	"time"
)

const (
	// leaseSize is how many bytes are taken, at most, before the machine is asked
	// again. When memory gets short it is a sixteenth of what is left: many
	// devices, and other programs, take memory side by side on what each of them
	// has read, and the reserve has to cover the sum.
	leaseSize = 16 << 20

	// leaseTime bounds how old the answer can be.
	leaseTime = time.Second
)

// A budget decides whether a store may take more memory. It is asked before, for
// afterwards there is only the out-of-memory killer.
type budget struct {
	limit int64                         // bytes; 0: as much as spare says
	spare func() (bytes int64, ok bool) // not ok: nobody knows

	// mu guards the rest.
	mu    sync.Mutex
	used  int64 // bytes taken
	lease int64 // bytes that can be taken without asking, until expiry
	until time.Time
}

func newBudget(limit int64) *budget {
	return &budget{limit: limit, spare: hostMachine().spare}
}

// take asks for n bytes. The error is ENOSPC.
func (b *budget) take(n int64) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.limit > 0 {
		if n > b.limit-b.used {
			return fmt.Errorf("%d of %d bytes are in use, %d more are needed: %w", b.used, b.limit, n, syscall.ENOSPC)
		}
		b.used += n
		return nil
	}
	if now := time.Now(); n > b.lease || now.After(b.until) {
		spare, ok := b.spare()
		if ok && n > spare {
			b.lease = 0
			return fmt.Errorf("the machine can spare %d bytes, %d are needed: %w", max(spare, 0), n, syscall.ENOSPC)
		}
		b.lease, b.until = leaseSize, now.Add(leaseTime)
		if ok {
			b.lease = min(b.lease, spare/16)
		}
		b.lease = max(b.lease, n)
	}
	b.lease -= n
	b.used += n
	return nil
}

// give returns n bytes to the machine; negative ones have been used without
// asking.
func (b *budget) give(n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.used -= n
}

func (b *budget) inUse() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.used
}
