package nbdnl_test

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
)

// The receiver of a connection that a request's timeout has ended may still be on its way when
// another socket takes the place, and then shuts that down (nbd_mark_nsock_dead at the end of
// recv_work): in about one of ten cases with Linux 6.12. What Reconfigure says of a socket stays
// true, and if it says that the socket was shut down, the next one serves.
func TestKernelReconfigureTimedOut(t *testing.T) {
	w := kernelWorld(t)
	const devices, rounds = 20, 10
	var undone atomic.Int64
	var wg sync.WaitGroup
	for range devices {
		d := &timedOut{world: w, serving: observe(t), undone: &undone}
		d.serving.holdAt(elsewhere)
		cfg := witnessed(d.serving)
		cfg.Timeout, cfg.DeadConnTimeout = timeout, time.Minute
		d.index, d.identifier = w.connect(cfg), cfg.Identifier
		f, p := w.open(d.index, os.O_RDONLY|syscall.O_DIRECT), aligned(t, block)
		d.read = func() error {
			_, err := f.ReadAt(p, elsewhere)
			return err
		}
		wg.Go(func() {
			for round := range rounds {
				if err := d.round(); err != nil {
					t.Errorf("nbd%d, round %d: %v", d.index, round, err)
					return
				}
			}
			f.Close()
			w.wantDetached(d.index, d.identifier)
		})
	}
	wg.Wait()
	t.Logf("%d sockets were shut down again in %d rounds", undone.Load(), devices*rounds)
}

// A timedOut is a device with one connection, whose server answers when its time is over.
type timedOut struct {
	world
	index      int
	identifier string
	serving    *witness
	read       func() error
	undone     *atomic.Int64
}

// timeout is that of the devices. A request that ends a connection in half of it does so for
// another reason: on a machine that stands still for longer, others do.
const timeout = 2 * time.Second

// round has a request time out, and another connection serve it.
func (d *timedOut) round() error {
	read := async(d.read)
	if _, err := d.serving.request(); err != nil {
		return err
	}
	for {
		select {
		case <-d.serving.gone:
		case <-time.After(soon):
			return errors.New("the connection of a request that is overdue is still there")
		}
		begin := time.Now()
		next, undone, err := d.replaceDead(d.index, d.identifier)
		if time.Since(begin) < timeout/2 {
			d.undone.Add(int64(undone))
		}
		if err != nil {
			return err
		}
		d.serving = next
		r, err := next.request()
		if err == nil {
			err = next.reply(r, 0)
		}
		if err == nil {
			break
		}
		if time.Since(begin) < timeout/2 {
			return fmt.Errorf("%w, %v after the socket was given", err, time.Since(begin))
		}
	}
	select {
	case err := <-read:
		return err
	case <-time.After(soon):
		return errors.New("the read does not end")
	}
}

// replaceDead gives a connection, which keeps requests elsewhere, and others for those that the
// kernel shuts down.
func (w world) replaceDead(index int, identifier string) (next *witness, undone int, err error) {
	for {
		next = observe(w)
		next.holdAt(elsewhere)
		err = w.Reconfigure(w.Context(), index, identifier, nbdnl.Update{Sockets: kernelEnds(next)})
		if !errors.Is(err, nbdnl.ErrShutDown) {
			return next, undone, err
		}
		undone++
	}
}

// request waits for a request that the witness keeps.
func (s *witness) request() (request, error) {
	select {
	case r := <-s.held:
		return r, nil
	case <-s.gone:
		return request{}, errors.New("the connection was shut down, although it served")
	case <-time.After(soon):
		return request{}, errors.New("the kernel sends no request")
	}
}

// The names of the kernel's threads show that it receives from each connection of a device. If not,
// for it was slow to make threads, the device does better the next time.
func TestKernelReceivers(t *testing.T) {
	w := kernelWorld(t)
	const connections, attempts = 4, 3
	for attempt := 1; ; attempt++ {
		cfg := witnessed(observe(t), observe(t), observe(t), observe(t))
		index := w.connect(cfg)
		err := w.WaitReceivers(t.Context(), index, connections)
		if err == nil {
			w.wantError(w.WaitReceivers(t.Context(), index, connections+1), nbdnl.ErrStranded)
		}
		w.wantDetached(index, cfg.Identifier)
		if err == nil {
			return
		}
		if !errors.Is(err, nbdnl.ErrStranded) || attempt == attempts {
			t.Fatal(err)
		}
		t.Log(err)
	}
}
