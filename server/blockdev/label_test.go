package blockdev

import (
	"encoding/json"
	"io"
	"log/slog"
	"strings"
	"sync"
	"testing"
)

// A lineLog takes a log of JSON records, a line each.
type lineLog struct {
	mu    sync.Mutex // guards lines
	lines []string
	came  chan struct{}
}

func (l *lineLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, string(p))
	select {
	case l.came <- struct{}{}:
	default:
	}
	return len(p), nil
}

// await returns the record with that message.
func (l *lineLog) await(t *testing.T, message string) map[string]any {
	t.Helper()
	for {
		l.mu.Lock()
		lines := l.lines
		l.mu.Unlock()
		for _, line := range lines {
			var r map[string]any
			if err := json.NewDecoder(strings.NewReader(line)).Decode(&r); err != nil && err != io.EOF {
				t.Fatal(err)
			}
			if r["msg"] == message {
				return r
			}
		}
		select {
		case <-l.came:
		case <-t.Context().Done():
			t.Fatalf("no %q in %s", message, lines)
		}
	}
}

// TestLabel holds that what the log tells of two devices with one logger can be told apart, be it
// the server that tells it or the device.
func TestLabel(t *testing.T) {
	log := &lineLog{came: make(chan struct{}, 1)}
	logger := slog.New(slog.NewJSONHandler(log, nil)).With("program", "test")
	k, m, o := lab(t)
	o.Logger = logger
	devices := make([]*Device, 2)
	for i := range devices {
		d, err := m.connect(t.Context(), anyIndex, newStore(), o)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { d.Close() })
		devices[i] = d
	}
	d := devices[1]
	d.lose(0)
	<-d.Done()
	check := func(r map[string]any) {
		t.Helper()
		if r["device"] != d.Path() || r["identifier"] != d.Identifier() || r["program"] != "test" {
			t.Errorf("the record is %v, want %s and %s", r, d.Path(), d.Identifier())
		}
	}
	check(log.await(t, "connection lost"))
	for _, d := range devices {
		d.Close() // tells of the lost connection
	}
	checkClean(t, k)

	k, d, kernel := manual(t, newElastic(), Options{Logger: logger})
	fails(t, d, kernel)
	check(log.await(t, "request failed"))
	if err := d.Close(); err == nil {
		t.Error("Close says nothing of a loss")
	}
	checkClean(t, k)
}
