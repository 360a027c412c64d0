package nbdnl

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"syscall"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl/internal/backoff"
	"github.com/nbdctl/nbdctl/nbdnl/internal/devices"
)

// Reconfigure changes a device that carries the identifier, and makes sure that the kernel has done
// what shows: the size, the block size, and that it took each of the sockets.
//
// The kernel drops a socket, and says nothing, when no connection is dead at that moment; and it
// takes a moment to notice the death of one. So a socket that was dropped is sent again for up to
// three seconds, or until ctx ends. The error for those that were never taken is a *DroppedError,
// they are as good as new, and all else in u was done. To tell, Reconfigure needs the device's
// timeout: from u, or because this Client has set it before. If the timeout is unknown, and may be
// 0, the error can match ErrNotVerified: the sockets are in use, or they are not. So it does when
// the kernel has not answered two seconds after the end of ctx.
//
// The kernel may also shut down a socket that it has just taken, when it notices the death of the
// connection before for a second time. Reconfigure therefore waits until that connection's receiver
// has ended, before it gives the sockets and again after. That takes a millisecond, and half a
// second at most; a tenth of a second each where the kernel's threads do not show, as in a
// container. Sockets that were shut down all the same are named in a *ShutDownError. They are of no
// use any more; the caller gives others, at once.
//
// A size or block size that is not in force matches errors.ErrUnsupported (see UnsupportedError),
// and the device stays changed. Otherwise the error matches what that of Drop does.
//
// Of a device that was connected by ioctls, this Client, which has connected it, can change the
// size, the block size and the timeout. The rest is refused with an UnsupportedError before
// anything is changed.
func (c *Client) Reconfigure(ctx context.Context, index int, identifier string, u Update) error {
	return newError("reconfigure", index, c.reconfigure(ctx, index, identifier, u))
}

func (c *Client) reconfigure(ctx context.Context, index int, identifier string, u Update) error {
	if err := u.validate(); err != nil {
		return err
	}
	use, err := c.owned(index, identifier)
	if err != nil {
		return err
	}
	if u.ClientFlags != nil {
		if err := c.removable(index, *u.ClientFlags); err != nil {
			return err
		}
	}
	m := c.recall(index, use)
	if m.disconnected {
		return fmt.Errorf("%w, only held", ErrNotConnected)
	}
	if u.BlockSize != nil && u.Size == nil {
		size, err := c.sysfs.Size(index)
		if err := errors.Join(err, checkSize(size, *u.BlockSize)); err != nil {
			return err
		}
	}
	if len(u.Sockets) > 0 && u.Timeout == nil && m.timed {
		u.Timeout = &m.timeout
	}
	pending, err := c.persist(ctx, index, use, identifier, u)
	if err = errors.Join(err, c.secure(ctx, index, u.Sockets, pending)); err != nil {
		return err
	}
	s, now, err := c.look(index)
	if err == nil && now != use {
		err = c.still(index, use)
	}
	if err != nil {
		return err
	}
	return u.missing(s)
}

// persist gives the command until it is answered and each socket is taken, within reason. It
// returns the positions of the sockets that were not, or that may not have been.
func (c *Client) persist(ctx context.Context, index int, use devices.Use, identifier string, u Update) ([]int, error) {
	sockets, pending := u.Sockets, make([]int, len(u.Sockets))
	for i := range pending {
		pending[i] = i
	}
	// Only a device with a timeout marks the sockets that it takes. So has one, for sure, the
	// device that has marked one.
	telling := u.Timeout != nil
	pause := backoff.New()
	defer pause.Stop()
	for begin, lost, blind := time.Now(), false, blindPatience; ; blind = 0 {
		// The worker that receives from a dead connection has no reference to its socket, and the
		// command takes the last one away (nbd_reconnect_socket): Linux 7.2 was seen to crash of
		// it. A worker that is between two replies would go on with the new socket, whose replies
		// then go to two.
		if len(pending) > 0 {
			if err := c.sys.settle(ctx, index, blind, func() bool { return false }); err != nil {
				return pending, errors.Join(&DroppedError{Index: index, Sockets: pending}, err)
			}
		}
		u.Sockets = nil
		for _, i := range pending {
			u.Sockets = append(u.Sockets, sockets[i])
		}
		taken, err := c.update(ctx, index, use, identifier, u)
		before := len(pending)
		pending = untaken(pending, taken)
		telling = telling || len(pending) < before
		answerLost := errors.Is(err, errAnswerLost)
		switch {
		case errors.Is(err, errNoAnswer) && len(pending) > 0:
			return pending, fmt.Errorf("%w: %w", ErrNotVerified, err)
		case err != nil && !answerLost:
			return pending, err
		case len(pending) > 0 && !telling:
			unknown := fmt.Errorf(
				"%w: the timeout of the device is not known here and may be 0, give it in the update",
				ErrNotVerified,
			)
			return pending, errors.Join(unknown, err)
		case answerLost && !lost:
			lost = true // what is left in u can be done twice
			continue
		case len(pending) == 0:
			return nil, err
		case answerLost || time.Since(begin) >= reconnectPatience:
			return pending, errors.Join(&DroppedError{Index: index, Sockets: pending}, err)
		}
		if err := pause.Wait(ctx, nil); err != nil {
			return pending, errors.Join(&DroppedError{Index: index, Sockets: pending}, err)
		}
	}
}

// secure waits until no receiver of an earlier connection can shut down a socket any more that was
// taken, as far as that shows, and returns a *ShutDownError for those with which that has happened.
// It takes so little time that the end of ctx does not matter.
func (c *Client) secure(ctx context.Context, index int, sockets []syscall.Conn, pending []int) error {
	if len(sockets) == len(pending) {
		return nil
	}
	shut := func() (positions []int) {
		for i, conn := range sockets {
			if !slices.Contains(pending, i) && isShutDown(conn) {
				positions = append(positions, i)
			}
		}
		return positions
	}
	over := func() bool { return len(shut()) > 0 }
	if err := c.sys.settle(context.WithoutCancel(ctx), index, blindPatience, over); err != nil {
		return err
	}
	if positions := shut(); len(positions) > 0 {
		return &ShutDownError{Index: index, Sockets: positions}
	}
	return nil
}

// untaken returns those of the positions whose socket was not taken.
func untaken(pending []int, taken []bool) []int {
	var rest []int
	for i, position := range pending {
		if i >= len(taken) || !taken[i] {
			rest = append(rest, position)
		}
	}
	return rest
}

// update gives the command once, and returns which of the sockets the kernel has taken.
//
// nbd_reconnect_socket gives a socket that it takes the device's timeout, if there is one, as the
// limit of each send. A limit that the kernel has set shows that the socket was taken, and one that
// it has not set, that it was not, provided that there is a timeout. Where there is none, one is
// lent to the device for the time of the command: TIMEOUT is obeyed before SOCKETS, and requests
// that begin in between have it too, of weeks.
func (c *Client) update(ctx context.Context, index int, use devices.Use, identifier string, u Update) ([]bool, error) {
	if err := c.reach(ctx); err != nil {
		return nil, err
	}
	if use.Identified && c.driver.mode() == ModeIoctl {
		return nil, fmt.Errorf("it was connected by netlink, and ioctls can't change it: %w", errors.ErrUnsupported)
	}
	if len(u.Sockets) > 0 {
		// The answer says where the sockets are.
		var cancel context.CancelFunc
		ctx, cancel = delayed(ctx, answerGrace)
		defer cancel()
	}
	taken, err := do(ctx, c.limit, func() (taken []bool, err error) {
		fds, err := dupSockets(u.Sockets)
		if err != nil {
			return nil, err
		}
		defer closeAll(fds)
		limits, err := clearSendLimits(fds)
		if err != nil {
			return nil, err
		}
		if err := c.still(index, use); err != nil {
			return nil, errors.Join(err, restoreSendLimits(fds, limits, nil))
		}
		sent, lend := u, len(fds) > 0 && u.Timeout != nil && *u.Timeout == 0
		if lend {
			lent := maxTimeout
			sent.Timeout = &lent
		}
		err = c.driver.reconfigure(index, identifier, &sent, fds)
		taken, limitErr := sendLimited(fds)
		if lend {
			err = errors.Join(err, c.driver.reconfigure(index, identifier, &Update{Timeout: u.Timeout}, nil))
			limitErr = errors.Join(limitErr, restoreSendLimits(fds, limits, nil))
		}
		return taken, errors.Join(err, limitErr, restoreSendLimits(fds, limits, taken))
	}, nil)
	if err == nil && u.Timeout != nil {
		c.remember(index, use, func(m *memory) { m.timed, m.timeout = true, *u.Timeout })
	}
	return taken, err
}
