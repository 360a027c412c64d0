package blockdev

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
)

// undoTime bounds what undoes a resize that failed half-way, and what looks at how far it came.
const undoTime = 5 * time.Second

// Resize gives the device another size in bytes, a positive multiple of the block size, while it is
// in use.
//
// The backend must be a backends.Resizer, or have that size already: a disk that has grown by
// itself is only shown to the kernel. Else the error matches errors.ErrUnsupported, or says that
// the device is read-only, whose backend is never resized. File systems and partitions on the
// device stay as they are: grow them after it, and shrink them before.
//
// Shrinking loses what lies behind the new end, so it is refused with a *nbdnl.BusyError while
// somebody uses the device; ForceResize does it all the same. Whoever comes to open it exclusively
// meanwhile, as a mount does, is kept out.
//
// The order is such that the kernel never sees a byte that nobody has:
//
//   - growing: first the backend, then the server, then the kernel. What fails is undone, unless
//     the kernel has not answered: it may still come to it, so the backend keeps its new size then.
//   - shrinking: first the kernel, then the server, then the backend, which is called when the last
//     request that was let in before is answered. If the server can't finish those, the kernel gets
//     its size back. If the backend fails, the device has the new size and the backend the old one;
//     calling again tries that again.
//
// The error says which. From Linux 6.12 on the kernel waits for all requests in flight before it
// takes another size, and executes no other command for any nbd device until then: not while
// connections are being replaced, so the device must be live. Resize returns when ctx ends,
// wherever it is; Size tells what the kernel has.
func (d *Device) Resize(ctx context.Context, size int64) error { return d.resize(ctx, size, false) }

// ForceResize is Resize, and shrinks the device even if somebody uses it. What they have cached
// behind the new end is lost.
func (d *Device) ForceResize(ctx context.Context, size int64) error { return d.resize(ctx, size, true) }

func (d *Device) resize(ctx context.Context, size int64, force bool) error {
	if err := d.served(); err != nil {
		return err
	}
	if err := d.change(ctx); err != nil {
		return err
	}
	defer d.unchange()
	if err := d.resizable(size); err != nil {
		return err
	}
	if err := d.settle(ctx); err != nil {
		return err
	}
	if size >= d.Size() {
		return d.grow(ctx, size)
	}
	if !force {
		dev, err := d.client.OpenExclusive(ctx, d.index)
		if err != nil {
			return err
		}
		defer dev.Close() // It was only looked at.
	}
	return d.shrink(ctx, size)
}

// resizable says what can be said without touching anything.
func (d *Device) resizable(size int64) error {
	switch have := d.backend.Size(); {
	case size <= 0 || size%int64(d.BlockSize()) != 0:
		return fmt.Errorf("blockdev: size %d is not a positive multiple of the block size, %d bytes",
			size, d.BlockSize())
	case have != size && d.ReadOnly():
		return fmt.Errorf("blockdev: %s is read-only: its backend keeps the size it has, %d bytes", d.Path(), have)
	case have != size && d.backend.Resizer == nil:
		return fmt.Errorf("blockdev: %s: the backend has %d bytes and can't be resized to %d: %w",
			d.Path(), have, size, errors.ErrUnsupported)
	}
	if s := d.State(); s != nbdnl.StateLive {
		return fmt.Errorf("blockdev: %s is %s: it can be resized when all its connections serve", d.Path(), s)
	}
	return nil
}

func (d *Device) grow(ctx context.Context, size int64) error {
	old, had := d.Size(), d.backend.Size()
	if err := d.resizeBackend(size); err != nil {
		return err
	}
	err := d.export.Resize(ctx, size)
	if err == nil {
		err = d.tell(ctx, size)
	}
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return fmt.Errorf("blockdev: %s: the kernel has not answered; the backend has %d bytes: %w",
			d.Path(), size, err)
	}
	if d.Size() == size {
		return err // The kernel has it, and says something else is wrong.
	}
	ctx, cancel := context.WithTimeout(ctx, undoTime)
	defer cancel()
	undo := d.export.Resize(ctx, old)
	if undo == nil {
		undo = d.resizeBackend(had)
	}
	return errors.Join(err, undo)
}

func (d *Device) shrink(ctx context.Context, size int64) error {
	old := d.Size()
	if err := d.tell(ctx, size); err != nil {
		return err
	}
	if err := d.drain(ctx, size); err != nil {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTime)
		defer cancel()
		return errors.Join(err, d.tell(ctx, old))
	}
	if err := d.resizeBackend(size); err != nil {
		return fmt.Errorf("blockdev: %s has %d bytes now, but its backend still has %d: %w",
			d.Path(), size, d.backend.Size(), err)
	}
	return nil
}

// drain shrinks the server's size. Requests wait meanwhile, and must not for so long that the
// kernel gives them up.
func (d *Device) drain(ctx context.Context, size int64) error {
	ctx, cancel := context.WithTimeoutCause(ctx, d.Timeout()/2, errors.New("the backend takes too long"))
	defer cancel()
	return d.export.Resize(ctx, size)
}

func (d *Device) resizeBackend(size int64) error {
	if d.backend.Size() == size {
		return nil
	}
	return d.backend.Resizer.Resize(size)
}

// tell gives the kernel another size, and makes sure that it has it.
func (d *Device) tell(ctx context.Context, size int64) error {
	if d.Size() == size {
		return nil
	}
	// Nothing but the size: the kernel sets it first, and waits for requests that other changes may
	// be there to help.
	err := d.reconfigure(ctx, nbdnl.Update{Size: &size})
	d.unsure = err != nil && ctx.Err() != nil
	if err := errors.Join(err, d.look(ctx)); err != nil {
		return err
	}
	if now := d.Size(); now != size {
		return fmt.Errorf("blockdev: %s: the kernel shows a size of %d bytes instead of %d", d.Path(), now, size)
	}
	return nil
}

// look takes note of the size that the kernel shows.
func (d *Device) look(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTime)
	defer cancel()
	st, err := d.client.Status(ctx, d.index)
	if err == nil && st.Connected() && st.Size > 0 {
		d.size.Store(st.Size)
		d.changed()
	}
	return err
}

// settle waits for an earlier change of size that the kernel has not answered to: another command
// is executed when that is done.
func (d *Device) settle(ctx context.Context) error {
	if !d.unsure {
		return nil
	}
	if err := d.reconfigure(ctx, nbdnl.Update{}); err != nil {
		return fmt.Errorf("blockdev: %s: an earlier change of size has not come to an end: %w", d.Path(), err)
	}
	d.unsure = false
	return d.look(ctx)
}
