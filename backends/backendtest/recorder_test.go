package backendtest

import (
	"fmt"
	"runtime"
	"sync"
	"testing"

	"github.com/nbdctl/nbdctl/backends"
)

// A recorder is a test that may fail without failing the one it runs in.
type recorder struct {
	testing.TB
	mu       sync.Mutex // guards failures
	failures []string
}

// record runs one check by itself.
func record(t *testing.T, name string, b backends.Backend, opts Options) *recorder {
	t.Helper()
	for _, c := range checks {
		if c.name != name {
			continue
		}
		r := &recorder{TB: t}
		var wg sync.WaitGroup
		wg.Go(func() { c.test(r, b, opts) }) // which Fatalf and Skip may end
		wg.Wait()
		return r
	}
	t.Fatalf("no check %s", name)
	return nil
}

func (r *recorder) Errorf(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failures = append(r.failures, fmt.Sprintf(format, args...))
}

func (r *recorder) Fatalf(format string, args ...any) {
	r.Errorf(format, args...)
	runtime.Goexit()
}

func (r *recorder) Skipf(format string, args ...any) {
	r.Errorf("skipped: "+format, args...)
	runtime.Goexit()
}

func (r *recorder) Skip(args ...any)    { r.Skipf("%s", fmt.Sprint(args...)) }
func (r *recorder) Helper()             {}
func (r *recorder) Logf(string, ...any) {}
