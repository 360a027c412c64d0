package blockdev

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// TestDropHeld has somebody open a device that did not become ready: it is dropped when he lets go
// of it, and if he does not, the error says so.
func TestDropHeld(t *testing.T) {
	for _, tt := range []struct {
		name string
		held time.Duration
		want error
	}{
		{"for a moment", 3 * time.Second, nil},
		{"for too long", time.Minute, context.DeadlineExceeded},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				k, d, client := piped(t, newStore(), Options{})
				_, release := k.Hold(d.Index())
				defer release()
				defer time.AfterFunc(tt.held, release).Stop()
				client.Close()
				begin := time.Now()
				err := d.drop(t.Context(), nil)
				took := time.Since(begin)
				if !errors.Is(err, tt.want) {
					t.Errorf("error is %v, want one that matches %v", err, tt.want)
				}
				if limit := min(tt.held, undoPatience); took < limit || took > limit+time.Second {
					t.Errorf("it took %v, want %v", took, limit)
				}
			})
		})
	}
}

// A prober opens devices that the kernel makes: those with an index of at least first and below
// end. It does so before the command that made them returns, and keeps them open.
type prober struct {
	nbdnl.Socket
	kernel     *nbdnltest.Kernel
	first, end int
	held       map[int]bool
}

func (p prober) Send(message []byte) error {
	err := p.Socket.Send(message)
	for index := p.first; index < p.end; index++ {
		_, missing := os.Stat(p.kernel.Path(fmt.Sprintf("sys/block/nbd%d", index)))
		if missing == nil && !p.held[index] {
			p.held[index] = true
			p.kernel.Hold(index)
		}
	}
	return err
}

// TestPoolBusyProber has somebody look at new devices for longer than the pool waits: it makes no
// more than four in vain.
func TestPoolBusyProber(t *testing.T) {
	const devices = 2 // which are in use
	for _, tt := range []struct {
		name    string
		looked  int // at new devices
		want    error
		created int
	}{
		{"at none", 0, nil, 1},
		{"at four", 4, nil, 5},
		{"at five", 5, nbdnl.ErrBusy, 5},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				k, m, _ := labOn(t, nbdnltest.Options{Devices: devices})
				held := make(map[int]bool)
				dial := m.system.Dial
				m.system.Dial = func() (nbdnl.Socket, error) {
					s, err := dial()
					return prober{s, k, devices, devices + tt.looked, held}, err
				}
				client, err := m.system.NewClient()
				if err != nil {
					t.Fatal(err)
				}
				defer client.Close()
				p, err := m.newPool(PoolOptions{Client: client})
				if err != nil {
					t.Fatal(err)
				}
				defer p.Close()
				for index := range devices {
					k.Hold(index)
				}
				ctx, cancel := context.WithTimeout(t.Context(), 10*calmPatience)
				defer cancel()
				lease, err := p.find(ctx)
				if !errors.Is(err, tt.want) {
					t.Errorf("error is %v, want one that matches %v", err, tt.want)
				}
				if tt.want == nil && (lease == nil || lease.Index() != devices+tt.looked) {
					t.Errorf("the lease is %+v, want that of nbd%d", lease, devices+tt.looked)
				}
				if lease != nil {
					if err := p.release(lease); err != nil {
						t.Error(err)
					}
				}
				indexes, err := client.Indexes()
				if err != nil || len(indexes) != devices+tt.created {
					t.Errorf("there are %v, %v, want %d new ones", indexes, err, tt.created)
				}
			})
		})
	}
}
