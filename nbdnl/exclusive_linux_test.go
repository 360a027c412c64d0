package nbdnl_test

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/holder"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// TestPatience holds that all who want a device for themselves wait equally long for those who have
// it open.
func TestPatience(t *testing.T) {
	tests := map[string]struct {
		holder string        // the name of a process that has the device open
		held   time.Duration // how long it has
		wait   time.Duration // until the caller has the device, or gives up
		busy   bool
	}{
		"udev, slow":     {"(udev-worker)", 14 * time.Second, 14 * time.Second, false},
		"udev, stuck":    {"(udev-worker)", 20 * time.Second, 15 * time.Second, true},
		"other, quick":   {"dd", 900 * time.Millisecond, 900 * time.Millisecond, false},
		"other, staying": {"dd", 20 * time.Second, time.Second, true},
	}
	ways := map[string]func(w world, index int, identifier string) error{
		"Detach": func(w world, index int, identifier string) error {
			return w.Detach(w.Context(), index, nbdnl.DetachOptions{Identifier: identifier})
		},
		"OpenExclusive": func(w world, index int, _ string) error {
			d, err := w.OpenExclusive(w.Context(), index)
			if err == nil {
				err = d.Close()
			}
			return err
		},
	}
	for name, tt := range tests {
		for way, do := range ways {
			t.Run(name+"/"+way, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w, k := fakeWorld(t, nbdnltest.Options{})
					cfg := unserved(t)
					index := w.connect(cfg)
					pid, release := k.Hold(index)
					comm := k.Path(filepath.Join("proc", strconv.Itoa(pid), "comm"))
					if err := os.WriteFile(comm, []byte(tt.holder+"\n"), 0o644); err != nil {
						t.Fatal(err)
					}
					defer time.AfterFunc(tt.held, release).Stop()
					begin := time.Now()
					err := do(w, index, cfg.Identifier)
					took := time.Since(begin)
					var busy *nbdnl.BusyError
					switch {
					case errors.As(err, &busy) != tt.busy || !tt.busy && err != nil:
						t.Errorf("error %v, want a BusyError: %t", err, tt.busy)
					case tt.busy && (len(busy.Holders) != 1 || busy.Holders[0].PID != pid):
						t.Errorf("held by %v, want process %d", busy.Holders, pid)
					}
					if took < tt.wait || took > tt.wait+200*time.Millisecond {
						t.Errorf("took %v, want %v", took, tt.wait)
					}
					release()
				})
			})
		}
	}
}

// TestOpenExclusive holds that a mount is not waited for, that one who shows nowhere is told of,
// and that nobody else gets the device while it is open.
func TestOpenExclusive(t *testing.T) {
	w, k := fakeWorld(t, nbdnltest.Options{})
	index := w.connect(unserved(t))
	unmount := k.Mount(index, "/mnt")
	var busy *nbdnl.BusyError
	begin := time.Now()
	if _, err := w.OpenExclusive(t.Context(), index); !errors.As(err, &busy) || busy.Holders[0].Path != "/mnt" {
		t.Errorf("mounted: %v", err)
	}
	if took := time.Since(begin); took > 500*time.Millisecond {
		t.Errorf("a mount was waited for: %v", took)
	}
	unmount()
	d, err := w.OpenExclusive(t.Context(), index)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := k.System().Open(nbdnl.Path(index), os.O_RDONLY|syscall.O_EXCL); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("open twice: %v", err)
	}
	_, err = w.OpenExclusive(t.Context(), index)
	if !errors.As(err, &busy) || busy.Holders[0].Kind != holder.Exclusive {
		t.Errorf("open already: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}
