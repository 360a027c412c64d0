package blockdev

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// A far is a device of ConnectRemote, with what its successor needs.
type far struct {
	*nbdnltest.Kernel
	machine machine
	options Options
	export  *farExport // of the old one
	old     *Device
}

// farDevice connects a device with so many connections.
func farDevice(t *testing.T, ko nbdnltest.Options, o Options) *far {
	t.Helper()
	k, m, lab := labOn(t, ko)
	f := &far{Kernel: k, machine: m, options: lab, export: newFarExport(t)}
	o.Client = lab.Client
	var err error
	if f.old, err = m.connectRemote(t.Context(), anyIndex, f.export, o); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.old.Close() })
	return f
}

// again returns another export of the same server, which a successor has.
func (f *farExport) again(t *testing.T) *farExport {
	t.Helper()
	other := &farExport{size: f.size, flags: f.flags, sizes: f.sizes, l: f.l}
	t.Cleanup(func() {
		for _, nc := range other.ends {
			nc.Close()
		}
	})
	return other
}

// asks returns always that one.
func asks(r Remote) RemoteOpener {
	return func(context.Context, *Document, []*os.File) (Remote, error) { return r, nil }
}

// copies returns copies of descriptors, as another process has them.
func copies(t *testing.T, files []*os.File) (copied []*os.File) {
	t.Helper()
	for _, f := range files {
		if err := control(f, func(fd int) error {
			fd, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
			copied = append(copied, os.NewFile(uintptr(fd), f.Name()))
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	return copied
}

// adopts has a successor with an export of its own go on with the device.
func (f *far) adopts(t *testing.T, h *Handover, r Remote) *Device {
	t.Helper()
	d, err := f.machine.takeOverRemote(t.Context(), h.Document, copies(t, h.Files), r, f.options, h.Complete)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// handOver is HandOver that succeeds.
func (f *far) handOver(t *testing.T) *Handover {
	t.Helper()
	h, err := f.old.HandOver(t.Context(), HandOverOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// talks holds that bytes go both ways between the server and who has the kernel's socket.
func talks(t *testing.T, server net.Conn, kernels *os.File) {
	t.Helper()
	p := make([]byte, 4)
	_ = server.SetReadDeadline(time.Now().Add(10 * time.Second))
	if err := control(kernels, func(fd int) error {
		_, err := unix.Write(fd, []byte("asks"))
		return err
	}); err != nil {
		t.Error(err)
	}
	if _, err := io.ReadFull(server, p); err != nil || string(p) != "asks" {
		t.Errorf("the server reads %q, %v", p, err)
		return
	}
	if _, err := server.Write([]byte("says")); err != nil {
		t.Error(err)
	}
	if err := control(kernels, func(fd int) error {
		_, err := unix.Read(fd, p)
		return err
	}); err != nil || string(p) != "says" {
		t.Errorf("the kernel reads %q, %v", p, err)
	}
}

// flagsOf returns the flags that all descriptors of a socket share, and one of its options, and
// which socket it is.
func flagsOf(t *testing.T, socket *os.File) (flags, buffer int, inode uint64) {
	t.Helper()
	if err := control(socket, func(fd int) error {
		var st unix.Stat_t
		err := unix.Fstat(fd, &st)
		inode = st.Ino
		if err == nil {
			flags, err = unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
		}
		if err == nil {
			buffer, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return flags, buffer, inode
}

// TestHandOverRemote has a successor go on with a device whose kernel speaks with another server:
// the kernel and the server notice nothing, and lost connections are replaced by the successor.
func TestHandOverRemote(t *testing.T) {
	f := farDevice(t, nbdnltest.Options{}, Options{Connections: 3, DeadTimeout: time.Hour})
	old := f.old
	f.export.reset()
	awaitReplaced(t, old, 1)
	for i, c := range old.conns.present() {
		if !c.dead.IsZero() {
			t.Errorf("connection %d is dead since %v", i, c.dead)
		}
	}
	old.losses.unsent(errors.New("nobody there"))
	before := f.Commands(nbdnltest.Connect) + f.Commands(nbdnltest.Reconfigure)
	ends := []*net.TCPConn{f.export.end(0), f.export.end(1), f.export.end(3)}
	var kernels []*os.File
	for i := range ends {
		kernels = append(kernels, old.watchedOf(i).socket)
		if err := control(kernels[i], func(fd int) error {
			return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 20<<10)
		}); err != nil {
			t.Fatal(err)
		}
	}
	kernels = copies(t, kernels)
	defer closeAll(kernels)

	ours, theirs := passage(t)
	handed := make(chan error, 1)
	note := json.RawMessage(`{"uri":"nbd://x"}`)
	go func() { handed <- old.HandOverTo(t.Context(), ours, HandOverOptions{Note: note, Files: kernels[:1]}) }()
	export := f.export.again(t)
	next, err := f.machine.takeOverEither(t.Context(), theirs, opens(newElastic()),
		func(_ context.Context, doc *Document, files []*os.File) (Remote, error) {
			if !doc.Remote || doc.Version != 2 || string(doc.Note) != string(note) || len(files) != 1 {
				t.Errorf("%d files came with %+v", len(files), doc)
			}
			closeAll(files)
			return export, nil
		}, f.options)
	if err := errors.Join(err, <-handed); err != nil {
		t.Fatal(err)
	}
	if !isDone(old) || old.Err() != ErrHandedOver || old.State() != nbdnl.StateIdle || old.Close() != nil {
		t.Errorf("the old one: %v, %v", old.State(), old.Err())
	}
	if err := old.Kick(t.Context()); err != ErrHandedOver {
		t.Errorf("kicked: %v", err)
	}
	for i, kernel := range kernels {
		flags, buffer, inode := flagsOf(t, next.watchedOf(i).socket)
		_, _, was := flagsOf(t, kernel)
		if flags&unix.O_NONBLOCK != 0 || buffer != 40<<10 || inode != was {
			t.Errorf("connection %d: flags %#x, send buffer %d, the same is %t", i, flags, buffer, inode == was)
		}
		talks(t, ends[i], kernel)
	}
	loss, ok := next.Loss().(*LossError)
	if o := next.Outage(); o != (Outage{Alive: 3, Replaced: 1}) || !ok || loss.Unsent == nil {
		t.Errorf("the successor says %+v, %v", o, loss)
	}
	if n := f.Commands(nbdnltest.Connect) + f.Commands(nbdnltest.Reconfigure); n != before ||
		f.export.count() != 4 || export.count() != 0 {
		t.Errorf("the kernel got %d commands, and the server %d connections and %d",
			n-before, f.export.count(), export.count())
	}
	if next.Timeout() != old.Timeout() || next.DeadTimeout() != time.Hour || next.Identifier() != old.Identifier() ||
		next.BlockSize() != 512 || next.Size() != old.Size() || next.Export() != nil || next.Index() != old.Index() {
		t.Errorf("the successor has %v, %v, %q", next.Timeout(), next.DeadTimeout(), next.Identifier())
	}
	_ = ends[1].SetLinger(0)
	ends[1].Close()
	awaitReplaced(t, next, 2)
	if f.export.count() != 4 || export.count() != 1 || f.Dead(next.Index()) != 0 {
		t.Errorf("the server got %d connections and %d", f.export.count(), export.count())
	}
	if !next.Acknowledge(1) {
		t.Error("the loss is another one")
	}
	if err := next.Close(); err != nil {
		t.Error(err)
	}
	export.hasEnded(t, 0)
	checkClean(t, f.Kernel)
}

// TestHandOverRemoteWaits holds that a handover waits for a replacement that is under way, that
// calls which change or end the device wait for it, and that a device which has ended has none.
func TestHandOverRemoteWaits(t *testing.T) {
	f := farDevice(t, nbdnltest.Options{}, Options{DeadTimeout: time.Hour})
	d := f.old
	soon := func() context.Context {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		t.Cleanup(cancel)
		return ctx
	}
	unblock := f.Block(nbdnltest.Reconfigure)
	f.export.reset()
	for f.Commands(nbdnltest.Reconfigure) == 0 {
		<-time.After(time.Millisecond)
	}
	if _, err := d.HandOver(soon(), HandOverOptions{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("beside a replacement: %v", err)
	}
	unblock()
	awaitReplaced(t, d, 1)
	h := f.handOver(t)
	timeout := time.Second
	_, again := d.HandOver(soon(), HandOverOptions{})
	for name, err := range map[string]error{
		"HandOver":    again,
		"Disconnect":  d.Disconnect(soon()),
		"Close":       d.CloseContext(soon()),
		"Reconfigure": d.Reconfigure(soon(), Update{Timeout: &timeout}),
	} {
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s in a handover: %v", name, err)
		}
	}
	h.Resume()
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if _, err := d.HandOver(t.Context(), HandOverOptions{}); !errors.Is(err, nbdnl.ErrNotConnected) {
		t.Errorf("after its end: %v", err)
	}
	if err := d.there(t.Context()); !errors.Is(err, nbdnl.ErrNotConnected) {
		t.Errorf("if nobody knows of its end: %v", err)
	}
	checkClean(t, f.Kernel)
}

// TestHandOverRemoteLease has the lease of the index go along.
func TestHandOverRemoteLease(t *testing.T) {
	f := farDevice(t, nbdnltest.Options{}, Options{})
	claims := f.options.Client.Claims()
	lease, err := claims.TryLease(f.old.Index())
	if err != nil {
		t.Fatal(err)
	}
	f.old.lease, f.old.giveBack = lease, lease.Leave
	h := f.handOver(t)
	if !h.Document.Leased || len(h.Files) != 2 {
		t.Errorf("%+v with %d files", h.Document, len(h.Files))
	}
	next := f.adopts(t, h, f.export.again(t))
	if l, err := claims.TryLease(next.Index()); !errors.Is(err, nbdnl.ErrBusy) {
		t.Errorf("the index can be leased: %v, %v", l, err)
	}
	if err := next.Close(); err != nil {
		t.Error(err)
	}
	if got, err := claims.Leased(); len(got) > 0 || err != nil {
		t.Errorf("leased are %v: %v", got, err)
	}
	checkClean(t, f.Kernel)
}

// TestWatchedLetGo holds that who lets a connection go leaves it to all others who have it.
func TestWatchedLetGo(t *testing.T) {
	for name, pair := range pairs {
		nc, peer := pair(t)
		w, err := newWatched(nc, func() bool { return true })
		if err != nil {
			t.Fatal(err)
		}
		kernels := copies(t, []*os.File{w.socket})
		w.letGo()
		w.letGo()
		if err := errors.Join(w.Close(), w.ended(t)); !errors.Is(err, net.ErrClosed) || w.Disconnected() {
			t.Errorf("%s: it ends with %v, disconnected %t", name, err, w.Disconnected())
		}
		if err := control(w.socket, func(int) error { return nil }); err == nil {
			t.Errorf("%s: the socket stays open here", name)
		}
		talks(t, peer, kernels[0])
		closeAll(kernels)
	}
}
