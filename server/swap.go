package server

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/server/wire"
)

// Swap puts b in the place of the backend while clients are at work: every request that was read
// before is executed by the old one and answered, every later one by b. When Swap returns nil, the
// old backend is not used any more and may be closed; what was written to it is durable, as after
// its Sync.
//
// It is for the caller to see that b has the content of the old one: it reads through to it, or has
// a copy, as SwapFunc lets one make. b must have the size of the export, and keep what clients were
// promised when they connected, for that can't be taken back: a device that can be written or
// trimmed, blocks as small, requests as long. If it does not, the error matches
// errors.ErrUnsupported.
//
// Between the last reply by the old backend and the first call of b, all connections stop reading.
// If ctx ends before that moment, the old backend stays, requests go on, and the error is the
// context's; so they do if its Sync fails. The read deadlines of the connections are used for it.
func (e *Export) Swap(ctx context.Context, b backends.Backend) error {
	if err := e.change(ctx); err != nil {
		return err
	}
	defer e.unchange()
	dev, err := e.successor(b)
	if err != nil {
		return err
	}
	return e.swap(ctx, func() (backends.Device, error) { return dev, nil })
}

// SwapFunc is like Swap for the backend that next returns. It is called at the moment at which the
// old one has executed and made durable all that was read, and nothing else is executed: no request
// sees what it does half-way, and what it copies is consistent. Clients wait meanwhile. If it
// returns the old backend nothing changes; if an error, SwapFunc returns that, and the old one
// stays. It must not call methods that change the export.
func (e *Export) SwapFunc(ctx context.Context, next func() (backends.Backend, error)) error {
	if err := e.change(ctx); err != nil {
		return err
	}
	defer e.unchange()
	return e.swap(ctx, func() (backends.Device, error) {
		b, err := next()
		if err != nil {
			return backends.Device{}, err
		}
		return e.successor(b)
	})
}

func (e *Export) swap(ctx context.Context, next func() (backends.Device, error)) error {
	// Most of what there is to sync is out of the way before anybody waits for it.
	if err := e.sync(ctx); err != nil {
		return err
	}
	h, err := e.hold(ctx)
	defer h.end(false)
	if err != nil {
		return err
	}
	if err := e.sync(ctx); err != nil {
		return err
	}
	dev, err := next()
	if err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.dev, e.can = dev, abilitiesOf(&dev) // The loops are held up: the close of release comes before their next look.
	e.noteAbilities()
	return nil
}

// successor returns b with its abilities sorted out, if it can do what clients rely on.
func (e *Export) successor(b backends.Backend) (backends.Device, error) {
	if b == nil {
		return backends.Device{}, errors.New("server: no backend")
	}
	dev := backends.Probe(b)
	longest := uint64(wire.MaxPayload)
	if m := dev.BlockSizes.Maximum; m > 0 {
		longest = uint64(m)
	}
	lacks := ""
	switch {
	case dev.Size() != e.Size():
		return dev, fmt.Errorf("server: the new backend has %d bytes, the export has %d", dev.Size(), e.Size())
	case e.flags&wire.FlagReadOnly == 0 && dev.WriterAt == nil:
		lacks = "can't be written"
	case e.flags&wire.FlagSendTrim != 0 && dev.Trimmer == nil:
		lacks = "can't be trimmed"
	case dev.BlockSizes.Minimum > e.blockSize:
		lacks = fmt.Sprintf("needs blocks of %d bytes, above the %d of the export", dev.BlockSizes.Minimum, e.blockSize)
	case longest < e.maxLength:
		lacks = fmt.Sprintf("takes requests up to %d bytes, below the %d of the export", longest, e.maxLength)
	default:
		lacks = e.lacksContext(&dev)
	}
	if lacks == "" {
		return dev, nil
	}
	return dev, fmt.Errorf("server: the new backend %s, which clients were promised when they connected: %w",
		lacks, errors.ErrUnsupported)
}

// lacksContext says which meta context of the export dev does not have, if there is one.
func (e *Export) lacksContext(dev *backends.Device) string {
	has, err := contextsOf(dev)
	if err != nil {
		return fmt.Sprintf("can't be served (%v)", err)
	}
	for _, c := range e.contexts {
		if !slices.ContainsFunc(has, func(d metaContext) bool { return d.Name == c.Name && (c.wide || !d.wide) }) {
			return fmt.Sprintf("has no meta context %q", c.Name)
		}
	}
	return ""
}

// Sync makes what was written to the backend durable, while requests go on. Before a Swap whose
// context leaves clients little time to wait, it takes most of that out of the way. If ctx ends
// first, the error is the context's, and the backend is left to it. That a backend could not be
// synced is part of Loss: many tell it once, and a flush that a client sends later then succeeds.
func (e *Export) Sync(ctx context.Context) error {
	if err := e.change(ctx); err != nil {
		return err
	}
	defer e.unchange()
	return e.sync(ctx)
}

func (e *Export) sync(ctx context.Context) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err := e.synced(ctx); err != nil {
		return err
	}
	syncer := e.dev.Syncer
	if syncer == nil {
		return nil
	}
	result := make(chan error, 1)
	go func() {
		debug.SetPanicOnFault(true)
		err := errNoReturn
		defer func() {
			if p := recover(); p != nil {
				err = &panicError{value: p, stack: debug.Stack()}
			}
			if err != nil {
				e.losses.note(&RequestError{Op: wire.CmdFlush, Err: err, Errno: uint32(wire.ErrnoOf(err)),
					Time: time.Now()})
			}
			result <- err
		}()
		err = syncer.Sync()
	}()
	select {
	case err := <-result:
		if err != nil {
			return fmt.Errorf("server: the backend can't be synced: %w", err)
		}
		return nil
	case <-ctx.Done():
		e.syncing = result
		return fmt.Errorf("server: the sync of the backend has not come to an end: %w", context.Cause(ctx))
	}
}

// synced waits for a sync that was given up, and is still at work in the backend, which must not be
// swapped out under it.
func (e *Export) synced(ctx context.Context) error {
	if e.syncing == nil {
		return nil
	}
	select {
	case <-e.syncing:
		e.syncing = nil
		return nil
	case <-ctx.Done():
		return fmt.Errorf("server: an earlier sync of the backend has not come to an end: %w", context.Cause(ctx))
	}
}
