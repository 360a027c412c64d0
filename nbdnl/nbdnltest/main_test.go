package nbdnltest

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

func TestMain(m *testing.M) { os.Exit(Main(m)) }

// A recorder takes what a test has to say without being one.
type recorder struct {
	testing.TB
	failed, skipped bool
}

func (r *recorder) Helper()               {}
func (r *recorder) Logf(string, ...any)   {}
func (r *recorder) Errorf(string, ...any) { r.failed = true }

func (r *recorder) Fatalf(string, ...any) {
	r.failed = true
	runtime.Goexit()
}

func (r *recorder) Skipf(string, ...any) {
	r.skipped = true
	runtime.Goexit()
}

// record runs f as a test would be run.
func record(t *testing.T, f func(testing.TB)) (failed, skipped bool) {
	r := &recorder{TB: t}
	done := make(chan struct{})
	go func() {
		defer close(done)
		f(r)
	}()
	<-done
	return r.failed, r.skipped
}

// TestRequire holds that a test without a kernel is never taken for one that has passed.
func TestRequire(t *testing.T) {
	noKernel := errors.New("none here")
	for _, tt := range []struct {
		name            string
		required        string
		err             error
		failed, skipped bool
	}{
		{"a kernel", "", nil, false, false},
		{"a kernel that is required", "1", nil, false, false},
		{"none", "", noKernel, false, true},
		{"none that is required", "1", noKernel, true, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Setenv(requireEnv, tt.required)
			failed, skipped := record(t, func(tb testing.TB) { require(tb, tt.err) })
			if failed != tt.failed || skipped != tt.skipped {
				t.Errorf("failed %t, skipped %t", failed, skipped)
			}
		})
	}
}

// TestCensus holds that what a test leaves behind is found, and what it has closed is not.
func TestCensus(t *testing.T) {
	before := takeCensus()
	f, err := os.Create(filepath.Join(t.TempDir(), "left"))
	if err != nil {
		t.Fatal(err)
	}
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		<-stop
	}()
	left := strings.Join(takeCensus().since(before), "\n")
	if runtime.GOOS == "linux" && !strings.Contains(left, f.Name()) {
		t.Errorf("the open file is not found in: %s", left)
	}
	if !strings.Contains(left, "TestCensus.func1") {
		t.Errorf("the goroutine is not found in: %s", left)
	}
	close(stop)
	<-stopped
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if left := strings.Join(takeCensus().since(before), "\n"); strings.Contains(left, f.Name()) {
		t.Errorf("the closed file is found in: %s", left)
	}
}
