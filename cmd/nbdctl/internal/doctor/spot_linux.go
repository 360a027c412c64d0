package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/claim"
)

// A spot is an index that devices are made on. It is leased, which keeps pools
// and other doctors away; it is claimed only when something is done to it, since
// Detach and blockdev claim it themselves. The kernel knows of neither, so that
// any other program may get it between two devices.
type spot struct {
	index int
	lease *claim.Lease
	// made is that it was made here, and so may go.
	made bool
	// settings are those of an index that was not made here, as they were.
	settings map[string]string
}

// maxLeft bounds the indexes that others have got.
const maxLeft = 3

// take finds a spot, which becomes the bench's.
func (b *bench) take(ctx context.Context) (err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, connectPatience, fmt.Errorf("not within %s", connectPatience))
	defer cancel()
	find := b.idle
	if b.fresh {
		find = b.add
	}
	s, err := find(ctx)
	if err == nil {
		b.spot = s
	}
	return err
}

// evade takes another spot if a connect has failed because this one is in use.
func (b *bench) evade(ctx context.Context, err error) bool {
	if !errors.Is(err, nbdnl.ErrBusy) || len(b.left) == maxLeft || ctx.Err() != nil {
		return false
	}
	lost := b.spot
	if b.take(ctx) != nil {
		return false // what is wrong with the first one is to be told
	}
	b.left = append(b.left, lost)
	return true
}

// occupy leases an index. The error matches nbdnl.ErrBusy if that is another's.
func (b *bench) occupy(index int) (*spot, error) {
	lease, err := b.machine.System.Claims().TryLease(index)
	if err != nil {
		return nil, err
	}
	if lease.Left() != "" {
		// What was left there is for its pool to reclaim.
		return nil, errors.Join(fmt.Errorf("%w: it was left behind", nbdnl.ErrBusy), lease.Leave())
	}
	return &spot{index: index, lease: lease}, nil
}

// add makes an index after all those that exist.
func (b *bench) add(ctx context.Context) (*spot, error) {
	for index := b.machine.nextIndex(); ; index++ {
		s, err := b.occupy(index)
		if errors.Is(err, nbdnl.ErrBusy) {
			continue
		}
		if err != nil {
			return nil, err
		}
		err = b.claimed(ctx, index, func() error {
			if b.machine.exists("sys/block", s.name()) {
				return nil // somebody else has made it in the meantime
			}
			err := b.client.AddIndex(ctx, index)
			s.made = err == nil
			return err
		})
		if s.made {
			return s, nil // what is wrong with a claim the next one meets again
		}
		if err = errors.Join(err, s.lease.Release()); err != nil {
			return nil, err
		}
	}
}

// idle finds the last index that nobody uses.
func (b *bench) idle(ctx context.Context) (*spot, error) {
	devices := b.machine.devices()
	for i := len(devices) - 1; i >= 0; i-- {
		index, _ := nbdnl.ParseIndex(devices[i]) // is one
		st, err := b.client.Status(ctx, index)
		if err != nil || st.State != nbdnl.StateIdle || !b.machine.exists("dev", devices[i]) {
			continue
		}
		s, err := b.occupy(index)
		if errors.Is(err, nbdnl.ErrBusy) {
			continue
		}
		if err == nil {
			s.settings = b.machine.readSettings(index)
		}
		return s, err
	}
	return nil, errors.New("an idle device")
}

// claimed does something while the index is claimed.
func (b *bench) claimed(ctx context.Context, index int, do func() error) error {
	claim, err := b.machine.System.Claims().Claim(ctx, index)
	if err != nil {
		return err
	}
	return errors.Join(do(), claim.Release())
}

// vacate leaves a spot as it was found, unless another program has connected a
// device there, whose index and settings they are now.
func (b *bench) vacate(s *spot) (err error) {
	ctx, cancel := context.WithTimeout(context.Background(), endPatience)
	defer cancel()
	defer func() { err = errors.Join(err, s.lease.Release()) }()
	b.spot = s
	b.settle(ctx)
	return b.claimed(ctx, s.index, func() error {
		switch st, err := b.client.Status(ctx, s.index); {
		case errors.Is(err, fs.ErrNotExist):
			return nil
		case err != nil:
			return err
		case st.Connected():
			return nil
		case s.made:
			return b.destroy(ctx)
		}
		return b.machine.restore(s)
	})
}

// destroy removes the index, which is claimed. Only a device that is connected
// can be told to go, and that may fail because somebody else was faster.
func (b *bench) destroy(ctx context.Context) (err error) {
	links, err := serveUnix(1, host.DefaultBlockSize)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, links.close()) }()
	cfg := trialConfig(nbdnl.Config{Sockets: links.kernel, ClientFlags: nbdnl.DestroyOnDisconnect})
	err = b.client.ConnectIndex(ctx, b.index, cfg)
	if errors.Is(err, nbdnl.ErrBusy) {
		if st, statusErr := b.client.Status(ctx, b.index); statusErr == nil && st.Connected() {
			return nil
		}
	}
	if err == nil {
		b.settle(ctx)
		err = errors.Join(b.cut(cfg.Identifier), b.gone(ctx))
	}
	if err != nil {
		return fmt.Errorf("the device that doctor has made is still there, unused: %w", err)
	}
	return nil
}

// restore puts the settings back that the index had.
func (m *Machine) restore(s *spot) error {
	now := m.readSettings(s.index)
	var errs []error
	for name, value := range s.settings {
		if value == now[name] {
			continue // also where /sys is read-only, as in a container
		}
		if name == "scheduler" {
			value = selected(value)
		}
		errs = append(errs, os.WriteFile(m.path(queue(s.index, name)), []byte(value), 0o644))
	}
	return errors.Join(errs...)
}
