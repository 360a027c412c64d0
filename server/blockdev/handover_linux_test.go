package blockdev

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"github.com/nbdctl/nbdctl/server"
	"github.com/nbdctl/nbdctl/server/wire"
)

// passage returns both ends of a Unix stream socket.
func passage(t *testing.T) (ours, theirs *net.UnixConn) {
	t.Helper()
	a, b := unixPair(t)
	return a.(*net.UnixConn), b.(*net.UnixConn)
}

// half sends the first bytes of a read, and waits until they are received.
func (o *orphan) half(t *testing.T, i int) {
	t.Helper()
	if _, err := o.kernel[i].Write(readRequest(0)[:11]); err != nil {
		t.Fatal(err)
	}
}

// rest sends what is left of it, and holds that it is answered.
func (o *orphan) rest(t *testing.T, i int) {
	t.Helper()
	if _, err := o.kernel[i].Write(readRequest(0)[11:]); err != nil {
		t.Fatal(err)
	}
	answered(t, o.kernel[i])
}

// hangUp shuts a connection down, as the kernel does after a timeout.
func (o *orphan) hangUp(t *testing.T, i int) {
	t.Helper()
	raw, err := o.kernel[i].SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Control(func(fd uintptr) { err = syscall.Shutdown(int(fd), syscall.SHUT_RDWR) }); err != nil {
		t.Fatal(err)
	}
}

// TestHandOverTo has a successor go on with a device from the middle of a request on, with all that
// is known of it.
func TestHandOverTo(t *testing.T) {
	o := orphaned(t, nbdnltest.Options{}, 2)
	old := o.adopt(t)
	read(t, o.kernel[0])
	read(t, o.kernel[1])
	old.losses.failed(&server.RequestError{Op: wire.CmdWrite, Offset: 512, Length: 1024, Err: syscall.EIO, Errno: 5})
	old.losses.unsent(errors.New("nobody there"))
	if !old.Acknowledge(2) {
		t.Error("the losses were not acknowledged")
	}
	old.losses.unwritten(errors.Join(nbdnl.ErrNotWritten))
	o.half(t, 0)
	before := o.Commands(nbdnltest.Connect) + o.Commands(nbdnltest.Reconfigure)

	extra, err := os.CreateTemp(t.TempDir(), "extra")
	if err != nil {
		t.Fatal(err)
	}
	defer extra.Close()
	if _, err := extra.WriteString("of the program"); err != nil {
		t.Fatal(err)
	}
	ours, theirs := passage(t)
	handed := make(chan error, 1)
	go func() {
		handed <- old.HandOverTo(t.Context(), ours, HandOverOptions{
			Note: json.RawMessage(`{"image":"x"}`), Files: []*os.File{extra},
		})
	}()
	next, err := o.machine.takeOverFrom(t.Context(), theirs,
		func(_ context.Context, doc *Document, files []*os.File) (backends.Backend, error) {
			if len(files) != 1 || string(doc.Note) != `{"image":"x"}` || doc.Index != 3 || doc.Size != size {
				t.Fatalf("%d files came with %+v", len(files), doc)
			}
			b := make([]byte, 14)
			if _, err := files[0].ReadAt(b, 0); err != nil || string(b) != "of the program" {
				t.Errorf("the file has %q: %v", b, err)
			}
			return newElastic(), files[0].Close()
		}, o.options)
	if err != nil {
		t.Fatal(err)
	}
	if err := <-handed; err != nil {
		t.Error(err)
	}
	o.rest(t, 0)
	read(t, o.kernel[1])

	if !isDone(old) || old.Err() != ErrHandedOver || old.State() != nbdnl.StateIdle {
		t.Errorf("the old one: %v, %v", old.State(), old.Err())
	}
	if err := old.HandOverTo(t.Context(), ours, HandOverOptions{}); !errors.Is(err, ErrHandedOver) {
		t.Errorf("handed over twice: %v", err)
	}
	// It has nothing to end: that is the successor's.
	if err := errors.Join(old.Disconnect(t.Context()), old.Close()); err != nil {
		t.Errorf("the end of the old one: %v", err)
	}
	if err := old.Kick(t.Context()); err != ErrHandedOver {
		t.Errorf("kicked: %v", err)
	}
	if n := o.Setting(3).Sockets; n != 2 {
		t.Fatalf("the kernel has %d connections", n)
	}
	read(t, o.kernel[1])
	if n := o.Commands(nbdnltest.Connect) + o.Commands(nbdnltest.Reconfigure); n != before || o.Dead(3) != 0 {
		t.Errorf("the kernel got %d commands, and has %d dead connections", n-before, o.Dead(3))
	}
	if n := total(next.Stats()); n != 5 || next.Stats()[1].Read.Requests != 3 || next.State() != nbdnl.StateLive {
		t.Errorf("%d reads are counted, want 5; it is %v", n, next.State())
	}
	want := *old.losses.told(3, true)
	got, ok := next.Loss().(*LossError)
	if !ok || got.Error() != want.Error() || got.Number != 3 || got.Failed.First.Offset != 512 ||
		!errors.Is(got, nbdnl.ErrNotWritten) {
		t.Errorf("the loss is %v, was %v", next.Loss(), &want)
	}
	if open := next.losses.told(3, false); open == nil || open.Failed != nil || open.Unwritten == nil {
		t.Errorf("not acknowledged is %v", open)
	}
	if !next.Acknowledge(3) {
		t.Error("the loss can't be acknowledged")
	}
	if err := next.Close(); err != nil {
		t.Error(err)
	}
	checkClean(t, o.Kernel)
}

func total(all []server.Stats) (n int) {
	for _, s := range all {
		n += int(s.Total().Requests)
	}
	return n
}

// TestHandOverDies has a successor die when everything was said: the old process connects the
// device again, and executes nothing of what the other one may have executed.
func TestHandOverDies(t *testing.T) {
	o := orphaned(t, nbdnltest.Options{}, 2)
	b := newElastic()
	reads := 0
	b.read = func() { reads++ }
	old, err := o.machine.adopt(t.Context(), o.e, b, o.options, nil, func() error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	ours, theirs := passage(t)
	handed := make(chan error, 1)
	go func() { handed <- old.HandOverTo(t.Context(), ours, HandOverOptions{}) }()
	_, files, err := receive(theirs)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := o.kernel[0].Write(readRequest(0)); err != nil {
		t.Fatal(err)
	}
	l := newLines(theirs)
	err = l.say(line{Ready: true})
	if err := errors.Join(err, l.expect(t.Context(), func(l line) bool { return l.Go })); err != nil {
		t.Fatal(err)
	}
	closeAll(files)
	theirs.Close()
	err = <-handed
	if err == nil || errors.Is(err, ErrHandedOver) || !strings.Contains(err.Error(), "connected again") {
		t.Errorf("handed over: %v", err)
	}
	for old.State() != nbdnl.StateLive || o.Commands(nbdnltest.Reconfigure) < 2 {
		select {
		case <-old.Changes():
		case <-old.Done():
			t.Fatal(old.Err())
		}
	}
	if reads != 0 {
		t.Error("a request was executed that the other process may have executed")
	}
	if err := old.Close(); err != nil {
		t.Error(err)
	}
	checkClean(t, o.Kernel)
}

// TestHandOverBusy holds that a backend which does not come back keeps its device, and that other
// calls wait for a handover.
func TestHandOverBusy(t *testing.T) {
	o := orphaned(t, nbdnltest.Options{}, 2)
	o.e.timeout = 500 * time.Millisecond
	b := newElastic()
	hang, inside := make(chan struct{}), make(chan struct{}, 8)
	b.read = func() { inside <- struct{}{}; <-hang }
	old, err := o.machine.adopt(t.Context(), o.e, b, o.options, nil, func() error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	if _, err := o.kernel[0].Write(readRequest(0)); err != nil {
		t.Fatal(err)
	}
	<-inside
	_, err = old.HandOver(t.Context(), HandOverOptions{})
	if err == nil || !strings.Contains(err.Error(), "takes too long") {
		t.Errorf("with a request in the backend: %v", err)
	}
	close(hang)
	answered(t, o.kernel[0])
	h, err := old.HandOver(t.Context(), HandOverOptions{Unsynced: true})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	_, again := old.HandOver(ctx, HandOverOptions{})
	timeout := time.Second
	for name, err := range map[string]error{
		"HandOver":    again,
		"Disconnect":  old.Disconnect(ctx),
		"Reconfigure": old.Reconfigure(ctx, Update{Timeout: &timeout}),
		"Resize":      old.Resize(ctx, 512),
	} {
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s in a handover: %v", name, err)
		}
	}
	h.Resume()
	h.Resume()
	h.Reconnect() // comes too late
	if err := h.Complete(); err != nil {
		t.Error(err)
	}
	read(t, o.kernel[1])
	if _, err := old.HandOver(t.Context(), HandOverOptions{Note: json.RawMessage("{")}); err == nil {
		t.Error("a note that is not JSON was taken")
	}
}

// TestHandOverDead has a connection die before a handover, and in it: the successor replaces them.
func TestHandOverDead(t *testing.T) {
	o := orphaned(t, nbdnltest.Options{}, 3)
	old := o.adopt(t)
	o.Fail(nbdnltest.Reconfigure, syscall.ENOMEM)
	o.hangUp(t, 0)
	for old.Alive() != 2 {
		<-old.Changes()
	}
	h, err := old.HandOver(t.Context(), HandOverOptions{})
	if err != nil {
		t.Fatal(err)
	}
	o.Fail(nbdnltest.Reconfigure, 0)
	if !h.Document.Connections[0].Dead || h.Document.Connections[1].Dead || len(h.Files) != 2 {
		t.Errorf("the document is %+v with %d files", h.Document.Connections, len(h.Files))
	}
	o.hangUp(t, 1)
	var files []*os.File
	for _, f := range h.Files { // as another process has them
		c, err := net.FileConn(f)
		if err != nil {
			t.Fatal(err)
		}
		copied, err := c.(*net.UnixConn).File()
		if err := errors.Join(err, c.Close()); err != nil {
			t.Fatal(err)
		}
		files = append(files, copied)
	}
	next, err := o.machine.takeOver(t.Context(), h.Document, files, newElastic(), o.options, h.Complete)
	if err != nil {
		t.Fatal(err)
	}
	read(t, o.kernel[2])
	for next.State() != nbdnl.StateLive {
		select {
		case <-next.Changes():
		case <-next.Done():
			t.Fatal(next.Err())
		}
	}
	if old.Err() != ErrHandedOver || old.Close() != nil {
		t.Errorf("the old one: %v, %v", old.Err(), old.Close())
	}
	if err := next.Close(); err != nil {
		t.Error(err)
	}
	checkClean(t, o.Kernel)
}

// TestHandOverUnsupported holds which devices can't be handed over, and that they say why.
func TestHandOverUnsupported(t *testing.T) {
	k, d := connectedWith(t, nbdnltest.Options{}, newElastic(), Options{})
	by := k.System()
	by.Mode = nbdnl.ModeIoctl
	ioctls, err := by.NewClient()
	if err != nil {
		t.Fatal(err)
	}
	defer ioctls.Close()
	for name, tt := range map[string]struct {
		d    *Device
		want string
	}{
		"ioctl":         {&Device{client: ioctls, export: d.export}, "ends with the process"},
		"ioctl, remote": {&Device{client: ioctls}, "ends with the process"},
	} {
		_, err := tt.d.HandOver(t.Context(), HandOverOptions{})
		if !errors.Is(err, errors.ErrUnsupported) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
