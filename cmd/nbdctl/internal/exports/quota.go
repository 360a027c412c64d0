package exports

import (
	"sync"
	"time"
)

const (
	quotaRecords = 10
	quotaPeriod  = 10 * time.Second
)

// A quota bounds what clients can have logged: quotaRecords in each quotaPeriod. The zero value is
// full.
type quota struct {
	mu    sync.Mutex // guards all below
	begun time.Time
	taken int
}

// take reports whether one more may be logged.
func (q *quota) take() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if now := time.Now(); now.Sub(q.begun) >= quotaPeriod {
		q.begun, q.taken = now, 0
	}
	q.taken++
	return q.taken <= quotaRecords
}
