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

// A limit decides whether a store may take more memory. It is asked before, for
// afterwards there is only the out-of-memory killer.
type limit struct {
	bytes int64                         // 0: as much as spare says
	spare func() (bytes int64, ok bool) // not ok: nobody knows

	// mu guards the rest.
	mu    sync.Mutex
	used  int64 // bytes taken
	lease int64 // bytes that can be taken without asking, until expiry
	until time.Time
}

func newLimit(bytes int64) *limit {
	return &limit{bytes: bytes, spare: hostMachine().spare}
}

// take asks for n bytes. The error is ENOSPC.
func (l *limit) take(n int64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.bytes > 0 {
		if n > l.bytes-l.used {
			return fmt.Errorf("%d of %d bytes are in use, %d more are needed: %w", l.used, l.bytes, n, syscall.ENOSPC)
		}
		l.used += n
		return nil
	}
	if now := time.Now(); n > l.lease || now.After(l.until) {
		spare, ok := l.spare()
		if ok && n > spare {
			l.lease = 0
			return fmt.Errorf("the machine can spare %d bytes, %d are needed: %w", max(spare, 0), n, syscall.ENOSPC)
		}
		l.lease, l.until = leaseSize, now.Add(leaseTime)
		if ok {
			l.lease = min(l.lease, spare/16)
		}
		l.lease = max(l.lease, n)
	}
	l.lease -= n
	l.used += n
	return nil
}

// give returns n bytes to the machine; negative ones have been used without
// asking.
func (l *limit) give(n int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.used -= n
}

func (l *limit) inUse() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.used
}
