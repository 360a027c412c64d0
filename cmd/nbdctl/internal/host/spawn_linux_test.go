package host

import (
	"context"
	"errors"
	"os"
	"syscall"
	"testing"
)

// TestAccepted holds when a serving process keeps its device.
func TestAccepted(t *testing.T) {
	live := t.Context()
	stopped := errors.New("stopped")
	ended, cancel := context.WithCancelCause(live)
	cancel(stopped)
	for _, tt := range []struct {
		name    string
		ctx     context.Context
		starter func(w *os.File)
		ok      bool
		is      error
	}{
		{"accepted", live, func(w *os.File) { w.Write([]byte{1}) }, true, nil},
		{"accepted, and then stopped", ended, func(w *os.File) { w.Write([]byte{1}) }, true, nil},
		{"stopped", ended, func(*os.File) {}, false, stopped},
		{"given up", live, func(w *os.File) { w.Close() }, false, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var p [2]int
			if err := syscall.Pipe2(p[:], syscall.O_CLOEXEC|syscall.O_NONBLOCK); err != nil {
				t.Fatal(err)
			}
			r, w := os.NewFile(uintptr(p[0]), "r"), os.NewFile(uintptr(p[1]), "w")
			defer w.Close()
			tt.starter(w)
			if err := accepted(tt.ctx, r); (err == nil) != tt.ok || tt.is != nil && !errors.Is(err, tt.is) {
				t.Errorf("error %v", err)
			}
		})
	}
}

// TestAcceptedLater holds that the wait goes on, and ends with its context.
func TestAcceptedLater(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error, 1)
	go func() { result <- accepted(ctx, r) }()
	cancel()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
}
