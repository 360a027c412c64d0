package blockdev

import (
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"github.com/nbdctl/nbdctl/server/wire"
)

// A farRelic is what the process of a device of ConnectRemote has left.
type farRelic struct {
	*far
	doc   Document
	files []*os.File
}

// keep notes what a keeper has now.
func (r *farRelic) keep(t *testing.T) {
	t.Helper()
	closeAll(r.files)
	var err error
	if r.doc, r.files, err = r.old.Keep(); err != nil {
		t.Fatal(err)
	}
}

// die has the process be dead: it lets go of everything, and touches nothing.
func (r *farRelic) die(t *testing.T) {
	t.Helper()
	if err := r.handOver(t).Complete(); err != nil {
		t.Fatal(err)
	}
}

// recover goes on with the device, with an export of its own.
func (r *farRelic) recover(t *testing.T, export *farExport) (*Device, error) {
	t.Helper()
	d, err := r.machine.recoverRemote(t.Context(), r.doc, r.files, export, r.options)
	if err == nil {
		t.Cleanup(func() { d.Close() })
	}
	return d, err
}

func farRelicOf(t *testing.T, connections int) *farRelic {
	t.Helper()
	r := &farRelic{far: farDevice(t, nbdnltest.Options{}, Options{Connections: connections, DeadTimeout: time.Hour})}
	r.keep(t)
	t.Cleanup(func() { closeAll(r.files) })
	return r
}

// awaitFound waits until all connections are alive, so many of which are not seen.
func awaitFound(t *testing.T, d *Device, notSeen int) {
	t.Helper()
	limit := time.After(20 * time.Second)
	for {
		awaitReplaced(t, d, 0)
		found := 0
		for i := range d.Connections() {
			if d.watchedOf(i).unseen {
				found++
			}
		}
		if found == notSeen {
			return
		}
		select { // One that is lost counts until that has shown.
		case <-d.Changes():
		case <-limit:
			t.Fatalf("%d connections are not seen, want %d", found, notSeen)
		}
	}
}

// TestRecoverRemote holds that the next process watches the connections as they are, replaces what
// is lost later, and that nothing else is touched.
func TestRecoverRemote(t *testing.T) {
	r := farRelicOf(t, 2)
	if r.doc.Version != KeptDocumentVersion || !r.doc.Remote || r.doc.Unseen || len(r.files) != 2 {
		t.Errorf("%d files with %+v", len(r.files), r.doc)
	}
	before := r.Setting(r.doc.Index)
	r.die(t)
	export := r.export.again(t)
	d, err := r.recover(t, export)
	if err != nil {
		t.Fatal(err)
	}
	if kept, replaced := d.Recovered(); kept != 2 || replaced != 0 || d.Alive() != 2 {
		t.Errorf("%d were kept, %d replaced, %d are alive", kept, replaced, d.Alive())
	}
	talks(t, r.export.end(0), d.watchedOf(0).socket)
	talks(t, r.export.end(1), d.watchedOf(1).socket)
	if diff := cmp.Diff(before, r.Setting(d.Index())); diff != "" || export.count() != 0 {
		t.Errorf("%d were dialled; the device was touched (-want +got):\n%s", export.count(), diff)
	}
	r.export.reset()
	awaitReplaced(t, d, 1)
	talks(t, export.end(0), d.watchedOf(1).socket)
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	checkClean(t, r.Kernel)
}

// TestRecoverRemoteLost has connections be lost after the death of the process, and before, while
// the server was away.
func TestRecoverRemoteLost(t *testing.T) {
	r := farRelicOf(t, 3)
	r.export.set(errors.New("no route"))
	r.export.reset()
	r.export.await(t, r.old, 4)
	r.keep(t)
	r.die(t)
	_ = r.export.end(0).SetLinger(0)
	r.export.end(0).Close()
	export := r.export.again(t)
	d, err := r.recover(t, export)
	if err != nil {
		t.Fatal(err)
	}
	awaitReplaced(t, d, 2)
	awaitFound(t, d, 0)
	if export.count() != 2 || r.Dead(d.Index()) != 0 {
		t.Errorf("%d were dialled, %d are dead", export.count(), r.Dead(d.Index()))
	}
	talks(t, r.export.end(1), d.watchedOf(1).socket)
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	checkClean(t, r.Kernel)
}

// TestRecoverRemoteUnseen has the process die with a connection of which nobody else has a
// descriptor: it is found, it counts, and it is replaced when it dies, however often another one
// does.
func TestRecoverRemoteUnseen(t *testing.T) {
	r := farRelicOf(t, 2)
	r.export.reset()
	awaitReplaced(t, r.old, 1)
	r.die(t)
	export := r.export.again(t)
	d, err := r.recover(t, export)
	if err != nil {
		t.Fatal(err)
	}
	if kept, replaced := d.Recovered(); kept != 1 || replaced != 1 {
		t.Errorf("%d were kept, %d replaced", kept, replaced)
	}
	awaitFound(t, d, 1)
	if o := d.Outage(); o.Replaced != 0 || o.Err != nil || export.count() != 1 {
		t.Errorf("%+v, %d were dialled", o, export.count())
	}

	// Of the other one it is known here, and the kernel tells of both.
	_ = r.export.end(0).SetLinger(0)
	r.export.end(0).Close()
	r.LinkDead(d.Index())
	awaitReplaced(t, d, 1)
	awaitFound(t, d, 1)
	export.set(errors.New("no route"))
	r.export.reset()
	r.LinkDead(d.Index())
	for d.Alive() != 1 || d.Outage().Err == nil {
		<-d.Changes()
	}
	doc, files, err := d.Keep()
	if err != nil || !doc.Unseen || len(files) != 1 {
		t.Errorf("%d files with %+v, %v", len(files), doc, err)
	}
	closeAll(files)
	export.set(nil)
	awaitReplaced(t, d, 2)
	awaitFound(t, d, 0)
	if r.Dead(d.Index()) != 0 {
		t.Errorf("%d are dead", r.Dead(d.Index()))
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	checkClean(t, r.Kernel)
}

// TestUnseenLater holds that what the kernel tells while another one is dropped counts for the
// connection that is found by that.
func TestUnseenLater(t *testing.T) {
	f := farDevice(t, nbdnltest.Options{}, Options{})
	u := newUnseen(f.old)
	heard, err := u.listen()
	if err != nil {
		t.Fatal(err)
	}
	w := u.find(heard)
	select {
	case <-w.hungUp:
		t.Error("nothing was told")
	default:
	}
	u.suspect(true)
	<-w.hungUp
	if again := u.find(heard); true {
		<-again.hungUp
	}
	closed := u.find(heard + 1)
	closed.Close()
	u.suspect(true) // which would end it twice
	if len(u.alive) != 0 {
		t.Errorf("%d are alive", len(u.alive))
	}
}

// TestUnseenHandedOver hands over a device whose connection is not seen: the next process finds it,
// too, and hears of the end of the device.
func TestUnseenHandedOver(t *testing.T) {
	r := farRelicOf(t, 1)
	r.die(t)
	r.doc.Connections[0].Dead, r.files = true, nil
	var err error
	if r.old, err = r.recover(t, r.export.again(t)); err != nil {
		t.Fatal(err)
	}
	awaitFound(t, r.old, 1)
	h := r.handOver(t)
	if !h.Document.Unseen || len(h.Files) != 0 {
		t.Errorf("%d files with %+v", len(h.Files), h.Document)
	}
	next := r.adopts(t, h, r.export.again(t))
	awaitFound(t, next, 1)
	if err := r.options.Client.Drop(t.Context(), next.Index(), next.Identifier()); err != nil {
		t.Fatal(err)
	}
	select {
	case <-next.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("it does not hear of the end")
	}
	if next.Err() != nil {
		t.Error(next.Err())
	}
	if err := next.Close(); err != nil {
		t.Error(err)
	}
	checkClean(t, r.Kernel)
}

// TestAttachRemote holds that a device is watched over again of which nobody has a descriptor, with
// connections that are alive, or dead.
func TestAttachRemote(t *testing.T) {
	r := farRelicOf(t, 2)
	left, err := r.options.Client.Status(t.Context(), r.doc.Index)
	if err != nil {
		t.Fatal(err)
	}
	r.die(t)
	r.export.reset()
	export, o := r.export.again(t), r.options
	o.Connections, o.Timeout, o.DeadTimeout = 2, 5*time.Second, 6*time.Second
	d, err := r.machine.attachRemote(t.Context(), left, export, o)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	awaitReplaced(t, d, 1)
	awaitFound(t, d, 1)
	if s := r.Setting(d.Index()); s.Timeout != 5 || s.DeadConnTimeout != 6 || r.Dead(d.Index()) != 0 {
		t.Errorf("%+v, %d are dead", s, r.Dead(d.Index()))
	}
	_ = r.export.end(0).SetLinger(0)
	r.export.end(0).Close()
	r.LinkDead(d.Index())
	awaitReplaced(t, d, 2)
	awaitFound(t, d, 0)
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	checkClean(t, r.Kernel)
}

// TestRecoverRemoteRefused holds that what is not the device, or not its export, is named, and that
// nothing is touched.
func TestRecoverRemoteRefused(t *testing.T) {
	doc := func(change func(*Document)) func(*farRelic, *farExport) {
		return func(r *farRelic, _ *farExport) { change(&r.doc) }
	}
	for name, tt := range map[string]struct {
		change func(*farRelic, *farExport)
		want   []string
		says   string
		attach bool // AttachRemote differs alike
	}{
		"identifier":  {change: doc(func(d *Document) { d.Identifier = "x" }), want: []string{"identifier"}},
		"incarnation": {change: doc(func(d *Document) { d.Incarnation++ }), want: []string{"incarnation"}},
		"is gone":     {change: doc(func(d *Document) { d.Index = 5 }), want: []string{"state"}},
		"larger": {
			change: func(_ *farRelic, e *farExport) { e.size *= 2 }, want: []string{"export size"}, attach: true,
		},
		"without flush": {
			change: func(_ *farRelic, e *farExport) { e.flags &^= wire.FlagSendFlush }, want: []string{"export flush"},
			attach: true,
		},
		"may not agree": {
			change: func(_ *farRelic, e *farExport) { e.flags &^= wire.FlagCanMultiConn },
			want:   []string{"export multi-conn"}, attach: true,
		},
		"handed over": {
			change: doc(func(d *Document) { d.Version = RemoteDocumentVersion }), says: "what Device.Keep has returned",
		},
		"of a process":   {change: doc(func(d *Document) { d.Remote = false }), says: "is served by a process"},
		"no connections": {change: doc(func(d *Document) { d.Connections = nil }), says: "0 connections"},
		"files": {
			change: func(r *farRelic, _ *farExport) { r.files = r.files[1:] }, says: "came with 1 descriptors",
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := farRelicOf(t, 2)
			left, err := r.options.Client.Status(t.Context(), r.doc.Index)
			if err != nil {
				t.Fatal(err)
			}
			r.die(t)
			index, before, open := r.doc.Index, r.Setting(r.doc.Index), len(descriptors(t))
			export := r.export.again(t)
			tt.change(r, export)
			d, err := r.recover(t, export)
			if d != nil || err == nil || !strings.Contains(err.Error(), tt.says) {
				t.Fatalf("%v, %v", d, err)
			}
			if diff := cmp.Diff(tt.want, mismatches(err)); diff != "" {
				t.Errorf("%v (-want +got):\n%s", err, diff)
			}
			if tt.attach {
				o := r.options
				o.Connections = 2
				d, err := r.machine.attachRemote(t.Context(), left, export, o)
				if diff := cmp.Diff(tt.want, mismatches(err)); d != nil || diff != "" {
					t.Errorf("attached: %v (-want +got):\n%s", err, diff)
				}
			}
			if diff := cmp.Diff(before, r.Setting(index)); diff != "" || r.Dead(index) != 0 || export.count() != 0 {
				t.Errorf("it was touched (-want +got):\n%s", diff)
			}
			if now := len(descriptors(t)); now > open {
				t.Errorf("there were %d descriptors, and now are %d", open, now)
			}
		})
	}
}

// TestAttachRemoteNameless holds that a device which does not show whose it is stays alone.
func TestAttachRemoteNameless(t *testing.T) {
	r := farRelicOf(t, 1)
	left, err := r.options.Client.Status(t.Context(), r.doc.Index)
	if err != nil {
		t.Fatal(err)
	}
	left.HasIdentifier = false
	_, err = r.machine.attachRemote(t.Context(), left, r.export, r.options)
	if !errors.Is(err, errors.ErrUnsupported) {
		t.Error(err)
	}
	if d := nbdnl.Path(left.Index); !strings.Contains(noIdentifier(left.Index).Error(), d) {
		t.Errorf("it does not say that it is %s", d)
	}
}
