package nbdnl_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nbdctl/nbdctl/nbdnl"
	"golang.org/x/sys/unix"
)

// A world is a kernel to act on, the fake one or a real one: both must answer each scenario alike.
type world struct {
	*testing.T
	*nbdnl.Client
	// hold opens a device like any other program.
	hold func(index int) (release func())
	// cut ends a connection of the device at the server's end.
	cut func(index int, r *responder)
	// another returns another program's client.
	another func() *nbdnl.Client
	// anonymous: the kernel keeps no identifiers, so that devices are known to those only who have
	// connected them.
	anonymous bool
	// mode is how devices are connected.
	mode nbdnl.Mode
}

func newClient(t *testing.T, system nbdnl.System) *nbdnl.Client {
	t.Helper()
	c, err := system.NewClient()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// mebi is the size of the scenarios' devices.
const mebi = 1 << 20

// config returns a valid configuration with the responders' sockets.
func config(responders ...*responder) nbdnl.Config {
	cfg := nbdnl.Config{
		Size:       mebi,
		BlockSize:  512,
		Flags:      nbdnl.FlagSendFlush,
		Timeout:    5 * time.Second,
		Identifier: nbdnl.NewIdentifier("test"),
	}
	for _, r := range responders {
		cfg.Sockets = append(cfg.Sockets, r.kernel)
	}
	return cfg
}

// connect connects a device, which is disconnected with the test at the latest.
func (w world) connect(cfg nbdnl.Config) int {
	w.Helper()
	index, err := w.Connect(w.Context(), cfg)
	if err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() {
		// Already gone where the scenario has disconnected it, and somebody else's by now perhaps.
		err := w.Drop(context.Background(), index, cfg.Identifier)
		if err != nil && !errors.Is(err, nbdnl.ErrNotConnected) && !errors.Is(err, nbdnl.ErrNotOwner) {
			w.Logf("at the end: %v", err)
		}
	})
	return index
}

func (w world) status(index int) nbdnl.Status {
	w.Helper()
	s, err := w.Status(w.Context(), index)
	if err != nil {
		w.Fatal(err)
	}
	return s
}

// wantState waits until the device is in that state: udev may be looking at it, which makes it held
// or keeps it from going idle.
func (w world) wantState(index int, want nbdnl.State) {
	w.Helper()
	s := w.status(index)
	patience := time.Now().Add(3 * time.Second)
	for s.State != want && time.Now().Before(patience) {
		<-time.After(5 * time.Millisecond)
		s = w.status(index)
	}
	if s.State != want {
		w.Errorf("%s is %v, want %v", nbdnl.Path(index), s.State, want)
	}
}

func (w world) wantError(err error, targets ...error) {
	w.Helper()
	for _, target := range targets {
		if !errors.Is(err, target) {
			w.Errorf("error is %v, want one that matches %v", err, target)
		}
	}
}

// impatiently calls f with a context that ends soon, and again with one that ends later until the
// error is what it should be: on a busy machine the first can end before the kernel was asked
// anything.
func (w world) impatiently(want error, f func(context.Context) error) (err error) {
	w.Helper()
	for patience := 50 * time.Millisecond; patience < soon; patience *= 4 {
		ctx, cancel := context.WithTimeout(w.Context(), patience)
		err = f(ctx)
		cancel()
		if err == nil || errors.Is(err, want) {
			break
		}
	}
	return err
}

// wantNotOwner checks that a command with another identifier than the device's was refused.
func (w world) wantNotOwner(err error) {
	w.Helper()
	if w.anonymous {
		w.wantError(err, errors.ErrUnsupported) // whose it is can't be told
		return
	}
	w.wantError(err, nbdnl.ErrNotOwner)
}

func (w world) wantDone(what string, err error) {
	w.Helper()
	if err != nil {
		w.Errorf("%s: %v", what, err)
	}
}

// wantReconfigured changes a device that carries the identifier.
func (w world) wantReconfigured(index int, identifier string, u nbdnl.Update) {
	w.Helper()
	w.wantDone("reconfigure", w.Reconfigure(w.Context(), index, identifier, u))
}

// carries reports whether the status is that of a device with the configuration's identifier, which
// not all kernels keep, and of no device that was connected by ioctls.
func carries(s nbdnl.Status, cfg nbdnl.Config) bool {
	return !s.HasIdentifier || s.Identifier == cfg.Identifier
}

// sockets is an update with the sockets of responders.
func sockets(responders ...*responder) nbdnl.Update {
	return nbdnl.Update{Sockets: config(responders...).Sockets}
}

// wantDropped checks that the sockets in these positions were dropped, and no others.
func (w world) wantDropped(err error, want ...int) {
	w.Helper()
	var dropped *nbdnl.DroppedError
	if !errors.As(err, &dropped) || !errors.Is(err, nbdnl.ErrNoDeadConnection) {
		w.Fatalf("error is %v, want one of dropped sockets", err)
	}
	if diff := cmp.Diff(want, dropped.Sockets); diff != "" {
		w.Errorf("dropped sockets (-want +got):\n%s", diff)
	}
}

// wantNoSendLimit checks that the kernel may send for as long as it takes.
func (w world) wantNoSendLimit(r *responder) {
	w.Helper()
	raw, err := r.kernel.SyscallConn()
	if err != nil {
		w.Fatal(err)
	}
	_ = raw.Control(func(fd uintptr) {
		tv, err := unix.GetsockoptTimeval(int(fd), unix.SOL_SOCKET, unix.SO_SNDTIMEO)
		if err != nil || *tv != (unix.Timeval{}) {
			w.Errorf("limit of sends is %v, %v", tv, err)
		}
	})
}

// untilVerified repeats a reconfigure that comes before the kernel has noticed the death of the
// connection.
func (w world) untilVerified(c *nbdnl.Client, index int, identifier string, u nbdnl.Update) error {
	for patience := time.Now().Add(3 * time.Second); ; {
		err := c.Reconfigure(w.Context(), index, identifier, u)
		if !errors.Is(err, nbdnl.ErrNotVerified) || time.Now().After(patience) {
			return err
		}
		<-time.After(10 * time.Millisecond)
	}
}

func (w world) wantRefusal(cfg nbdnl.Config, mention string) {
	w.Helper()
	_, err := w.Connect(w.Context(), cfg)
	if err == nil || !strings.Contains(err.Error(), mention) {
		w.Errorf("error is %v, want one that mentions %q", err, mention)
	}
}
