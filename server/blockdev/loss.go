package blockdev

import (
	"errors"
	"fmt"
	"sync"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/server"
)

// A LossError tells of bytes that were written to a device and may not be in its backend. It
// unwraps to what it consists of, which errors.As and errors.Is find.
type LossError struct {
	// Number is how many losses there have been since the device was connected. It tells whether a
	// loss is new: the same Number is the same loss, asked for again, and a new one has a higher
	// Number.
	Number uint64
	// Failed are the requests that were answered with an error; nil if none was.
	Failed *server.LossError
	// Unsent is why the kernel may have failed writes by itself, for there was no connection to
	// send them over; nil if it has not. Of several times it is the first.
	Unsent error
	// Unwritten is what the kernel said when Flush had it write what was cached, which it says
	// once; nil if that went well. Of several times it is the first.
	Unwritten error

	index int
}

func (e *LossError) Error() string {
	if err := errors.Join(e.parts()...); err != nil {
		return err.Error()
	}
	return "blockdev: writes may be lost" // No LossError of this package is so empty.
}

// Unwrap returns the parts of the loss.
func (e *LossError) Unwrap() []error { return e.parts() }

func (e *LossError) parts() (parts []error) {
	if e.Failed != nil {
		parts = append(parts, fmt.Errorf("blockdev: %s: %w", nbdnl.Path(e.index), e.Failed))
	}
	if e.Unsent != nil {
		const unsent = "blockdev: %s: writes may be lost, for there was no connection to send them over: %w"
		parts = append(parts, fmt.Errorf(unsent, nbdnl.Path(e.index), e.Unsent))
	}
	if e.Unwritten != nil {
		parts = append(parts, e.Unwritten)
	}
	return parts
}

// losses are the losses of a device, numbered as they come. The zero value is none. Safe for
// concurrent use.
type losses struct {
	mu sync.Mutex // guards all below
	// Neither changes once it is there: a loss more makes another one. Nil is none.
	all  *LossError
	open *LossError // since Acknowledge
	// notify is called when a loss comes while none is open; nil: nobody is.
	notify func()
	// excused is whether only requests that have failed count: there is nothing else to lose on a
	// read-only device, nor after an orderly end, and who kicks a device gives up what is cached.
	excused bool
}

// excuse has nothing but requests that have failed counted from now on.
func (l *losses) excuse() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.excused = true
}

// failed notes a request that was answered with an error.
func (l *losses) failed(r *server.RequestError) {
	l.add(true, func(e *LossError) {
		failed := server.LossError{First: r}
		if e.Failed != nil {
			failed = *e.Failed
		}
		failed.Requests++
		e.Failed = &failed
	})
}

// unsent notes that the kernel may have failed writes that no connection carried to the server, and
// why.
func (l *losses) unsent(reason error) {
	l.add(false, func(e *LossError) {
		if e.Unsent == nil {
			e.Unsent = reason
		}
	})
}

// unwritten notes that the kernel could not write what it had cached.
func (l *losses) unwritten(err error) {
	l.add(false, func(e *LossError) {
		if e.Unwritten == nil {
			e.Unwritten = err
		}
	})
}

// add gives a loss its number, and puts it into what is told. One that does not always count may be
// excused.
func (l *losses) add(always bool, note func(*LossError)) {
	l.mu.Lock()
	if l.excused && !always {
		l.mu.Unlock()
		return
	}
	first := l.open == nil
	number := uint64(1)
	if l.all != nil {
		number = l.all.Number + 1
	}
	for _, told := range []**LossError{&l.all, &l.open} {
		var e LossError
		if *told != nil {
			e = **told
		}
		note(&e)
		e.Number = number
		*told = &e
	}
	notify := l.notify
	l.mu.Unlock()
	if first && notify != nil {
		notify()
	}
}

// acknowledge has what was lost so far not told as open any more, if number is the last.
func (l *losses) acknowledge(number uint64) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.all == nil || l.all.Number != number {
		return false
	}
	l.open = nil
	return true
}

// told returns what was lost of the device with that index, ever, or since the last was
// acknowledged: nil, or the same pointer as long as nothing changes.
func (l *losses) told(index int, ever bool) *LossError {
	l.mu.Lock()
	defer l.mu.Unlock()
	told := &l.open
	if ever {
		told = &l.all
	}
	if *told != nil && (*told).index != index { // Which is known only when the kernel has the device.
		e := **told
		e.index = index
		*told = &e
	}
	return *told
}

// hand returns what another process has to know: all that was lost, and what of it is open.
func (l *losses) hand() (all, open *HandedLoss) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all.hand(), l.open.hand()
}

// forget has nothing told as open any more: another process tells it.
func (l *losses) forget() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.open = nil
}

// take goes on with the losses of another process, before there are any here.
func (l *losses) take(all, open *HandedLoss) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all, l.open = all.loss(), open.loss()
}

// Loss returns what was lost since the device was connected, or nil: that what was lost has been
// written anew, only who wrote it can know. It writes nothing, and does not block. An error is a
// *LossError; its Number tells a new loss from one that was told.
func (d *Device) Loss() error {
	if loss := d.losses.told(d.index, true); loss != nil {
		return loss
	}
	return nil
}

// Acknowledge says that the owner of the device knows of the losses up to that Number. Flush,
// Disconnect and Close do not tell them any more, and Loss does. It reports whether Number is that
// of the last loss; if another one has come since, or there was none, it does nothing, and what to
// ask for again is Loss.
func (d *Device) Acknowledge(number uint64) bool { return d.losses.acknowledge(number) }

// withLoss joins to an error what was lost and not acknowledged, unless that includes it.
func (d *Device) withLoss(err error) error {
	loss := d.losses.told(d.index, false)
	switch {
	case loss == nil:
		return err
	case err == nil, errors.Is(loss, err):
		return loss
	}
	return errors.Join(err, loss)
}
