package server_test

import (
	"errors"
	"os"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/server"
)

// TestHungUp has a client hang up while the backend keeps the loop waiting: what lay unread in the
// connection is not executed any more.
func TestHungUp(t *testing.T) {
	tests := map[string]struct {
		warm bool
		o    server.Options
	}{
		"in a call":   {true, server.Options{}},
		"at the gate": {false, server.Options{MaxInFlight: 1}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			d := newDisk(1 << 20)
			entered, release := make(chan struct{}), make(chan struct{})
			d.before = func(op string, off, n int64) error {
				if op == "read" && off == 0 {
					entered <- struct{}{}
					<-release
				}
				return nil
			}
			e := export(t, d, tt.o)
			b := connectSockets(t, e)
			write := func(off uint64, s string) call { return call{op: cmdWrite, offset: off, data: []byte(s)} }
			var result chan error
			for stuck := false; !stuck; {
				if tt.warm {
					warm(b.client) // On a busy machine it may look slow for all that, and get workers.
				}
				a, theirs := socketpair(t)
				ended := make(chan error, 1)
				go func() { ended <- e.NewConn(theirs, nil).Transmit() }()
				// received together
				a.Write(append(call{op: cmdRead, length: 512}.encode(1), write(8192, "old").encode(2)...))
				<-entered
				a.Write(write(12288, "old").encode(3))
				a.SetReadDeadline(time.Now().Add(600 * time.Millisecond)) // It takes that long to lose one's patience.
				_, err := a.Read(make([]byte, 16))
				if stuck = errors.Is(err, os.ErrDeadlineExceeded); !stuck {
					release <- struct{}{}
				}
				a.Close()
				result = ended
			}
			for _, off := range []uint64{8192, 12288} {
				b.expect(0, write(off, "old"))
				b.expect(0, write(off, "new"))
			}
			release <- struct{}{}
			checkError(t, <-result, errAny)
			for _, off := range []uint64{8192, 12288} {
				if got := b.expect(0, call{op: cmdRead, offset: off, length: 3}); string(got) != "new" {
					t.Errorf("at %d %q is stored", off, got)
				}
			}
			b.disconnect()
		})
	}
}

// TestHungUpLate has a client lose its patience just after it was seen to be there: what waits at
// the gate is not executed all the same.
func TestHungUpLate(t *testing.T) {
	const second, third = 4096, 65536
	d := newDisk(1 << 20)
	entered, release := make(chan struct{}), make(chan struct{})
	d.before = func(op string, off, n int64) error {
		if op == "write" && off <= second {
			entered <- struct{}{}
			<-release
		}
		return nil
	}
	e := export(t, d, server.Options{MaxInFlight: 1})
	b := connectSockets(t, e)
	write := func(off uint64, s string) call { return call{op: cmdWrite, offset: off, data: []byte(s)} }
	b.expect(0, write(third, "none"))
	a, theirs := socketpair(t)
	ended := make(chan error, 1)
	go func() { ended <- e.NewConn(theirs, nil).Transmit() }()
	a.Write(append(append(write(0, "x").encode(1), write(second, "x").encode(2)...), write(third, "old").encode(3)...))
	<-entered
	<-time.After(600 * time.Millisecond)
	release <- struct{}{}
	<-entered // The client is there.
	a.Close()
	b.expect(0, write(third, "old"))
	b.expect(0, write(third, "new"))
	release <- struct{}{}
	checkError(t, <-ended, errAny)
	if got := b.expect(0, call{op: cmdRead, offset: third, length: 3}); string(got) != "new" {
		t.Errorf("%q is stored", got)
	}
	b.disconnect()
}

// TestHungUpHeld has a client hang up while nothing is executed, because the backend is being
// swapped, as when the process stands still: what it had sent is not executed afterwards.
func TestHungUpHeld(t *testing.T) {
	for name, wrap := range map[string]func(*disk) backends.Backend{
		"plain":  func(d *disk) backends.Backend { return d },
		"direct": func(d *disk) backends.Backend { return directDisk{d} },
	} {
		t.Run(name, func(t *testing.T) {
			d := newDisk(1 << 20)
			disk := wrap(d)
			e := export(t, disk, server.Options{})
			b := connectSockets(t, e)
			b.expect(0, call{op: cmdWrite, data: make([]byte, 512)})
			a := connectSockets(t, e)
			a.expect(0, call{op: cmdWrite, offset: 4096, data: make([]byte, 512)})
			err := e.SwapFunc(t.Context(), func() (backends.Backend, error) {
				var burst []byte
				for i := range 8 {
					q := call{op: cmdWrite, offset: 8192, data: []byte("old")}
					burst = append(burst, q.encode(uint64(i))...)
				}
				a.nc.Write(burst)
				<-time.After(600 * time.Millisecond)
				a.nc.Close()
				d.history()
				return disk, nil
			})
			if err != nil {
				t.Error(err)
			}
			checkError(t, <-a.err, errAny)
			b.expect(0, call{op: cmdWrite, offset: 8192, data: []byte("new")})
			if calls := d.history(); len(calls) != 1 {
				t.Errorf("calls of the backend: %q, want the new write", calls)
			}
			b.disconnect()
		})
	}
}

// TestHungUpWaiting has a client hang up whose request waits for its turn: it is given up, and its
// connection ends at once.
func TestHungUpWaiting(t *testing.T) {
	d := newDisk(1 << 20)
	release := hangOnce(d, 0)
	defer release()
	e := export(t, d, server.Options{})
	a, b := connectSockets(t, e), connectSockets(t, e)
	q := call{op: cmdWrite, data: []byte("data")}
	first := a.start(q)
	for len(d.history()) == 0 {
		<-time.After(time.Millisecond)
	}
	b.start(q)
	<-time.After(20 * time.Millisecond) // Then its worker waits.
	b.nc.Close()
	checkError(t, <-b.err, errAny)
	if calls := d.history(); len(calls) != 0 {
		t.Errorf("calls of the backend: %q, want none", calls)
	}
	release()
	answered(t, first, "the first")
	a.disconnect()
}
