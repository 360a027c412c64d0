package blockdev

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// What is left of a device whose process has died, as a keeper has it.
type relic struct {
	*orphan
	doc    Document
	files  []*os.File
	ledger *ledger
}

// relicOf leaves a device whose connections had begun so much each when its process died.
func relicOf(t *testing.T, begun ...uint32) *relic {
	t.Helper()
	r := &relic{orphan: orphaned(t, nbdnltest.Options{}, len(begun))}
	var err error
	if r.ledger, err = newLedger(len(begun)); err != nil {
		t.Fatal(err)
	}
	r.doc = Document{
		Version: KeptDocumentVersion, Index: r.e.index, Incarnation: r.e.incarnation, Identifier: r.e.identifier,
		Size: r.e.size, BlockSize: r.e.blockSize, Flags: r.e.flags, Timeout: r.e.timeout, DeadTimeout: r.e.deadTimeout,
	}
	for i, n := range begun {
		e := r.ledger.enter()
		e.word().Store(n)
		r.doc.Connections = append(r.doc.Connections, HandedConnection{Slot: e.number, Use: e.use})
		f, err := r.e.links[i].conn.(*net.UnixConn).File()
		if err != nil {
			t.Fatal(err)
		}
		r.files = append(r.files, f)
	}
	closeLinks(r.e.links)
	f, err := r.ledger.copy()
	if err := errors.Join(err, r.ledger.close()); err != nil {
		t.Fatal(err)
	}
	r.files = append(r.files, f)
	t.Cleanup(func() { closeAll(r.files) })
	return r
}

// recover goes on with it, by way of what a keeper writes down.
func (r *relic) recover(t *testing.T, b *fitting) (*Device, error) {
	t.Helper()
	p, err := json.Marshal(r.doc)
	if err != nil {
		t.Fatal(err)
	}
	var doc Document
	if err := json.Unmarshal(p, &doc); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	return r.machine.recover(ctx, doc, r.files, b.backend(), r.options)
}

// stillLeft returns how many connections a successor could go on with.
func (r *relic) stillLeft(t *testing.T) (n int) {
	t.Helper()
	for _, c := range r.doc.Connections {
		still, err := recordOf(r.files[len(r.files)-1], c).still()
		if err != nil {
			t.Fatal(err)
		}
		if still {
			n++
		}
	}
	return n
}

func fits() *fitting { return &fitting{store: newStore(), size: size} }

// TestRecover goes on with a device whose process has died: with the connections that stood still
// as they are, and with others in the place of those that did not, or that the kernel has given up.
func TestRecover(t *testing.T) {
	for name, tt := range map[string]struct {
		begun  []uint32
		change func(t *testing.T, r *relic)
		kept   int
	}{
		"all still":   {[]uint32{0, 0}, nil, 2},
		"one still":   {[]uint32{3, 0}, nil, 1},
		"none still":  {[]uint32{1, 129}, nil, 0},
		"one, still":  {[]uint32{0}, nil, 1},
		"one, busy":   {[]uint32{2}, nil, 0},
		"not in it":   {[]uint32{0, 0}, func(_ *testing.T, r *relic) { r.doc.Connections[1].Use = 0 }, 1},
		"another use": {[]uint32{0, 0}, func(_ *testing.T, r *relic) { r.doc.Connections[0].Use++ }, 1},
		"hung up":     {[]uint32{0, 0}, func(t *testing.T, r *relic) { r.hangUp(t, 1) }, 1},
		"hung up after a request": {[]uint32{0, 0}, func(t *testing.T, r *relic) {
			r.half(t, 1) // It is there to be received, and must not be.
			r.hangUp(t, 1)
		}, 1},
		"dead before": {[]uint32{0, 0}, func(t *testing.T, r *relic) {
			r.hangUp(t, 0)
			r.files[0].Close()
			r.files, r.doc.Connections[0] = r.files[1:], HandedConnection{Dead: true}
		}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			r := relicOf(t, tt.begun...)
			n := len(tt.begun)
			if tt.change != nil {
				tt.change(t, r)
			}
			for i, c := range r.doc.Connections {
				if still := c.Use != 0 && !c.Dead && tt.begun[i] == 0 && name == "all still"; still {
					r.half(t, i) // The kernel is in the middle of a request.
				}
			}
			before := r.Setting(3)
			d, err := r.recover(t, fits())
			if err != nil {
				t.Fatal(err)
			}
			if kept, replaced := d.Recovered(); kept != tt.kept || replaced != n-tt.kept {
				t.Errorf("%d were kept and %d replaced, want %d of %d kept", kept, replaced, tt.kept, n)
			}
			if got := r.Commands(nbdnltest.Reconfigure); got != n-tt.kept {
				t.Errorf("the kernel got %d commands, want %d", got, n-tt.kept)
			}
			if diff := cmp.Diff(before, r.Setting(3)); diff != "" || r.Dead(3) != 0 || d.Alive() != n {
				t.Errorf("%d are dead, %d alive; settings that have changed (-want +got):\n%s",
					r.Dead(3), d.Alive(), diff)
			}
			if name == "all still" {
				r.rest(t, 0)
				r.rest(t, 1)
				read(t, r.orphan.kernel[1])
			}
			if n := r.stillLeft(t); n != 0 {
				t.Errorf("somebody else could go on with %d connections", n)
			}
			if err := d.Close(); err != nil {
				t.Error(err)
			}
			checkClean(t, r.Kernel)
		})
	}
}

// TestRecoverRefused holds what is not recovered, and that the device waits for the right one with
// its connections as they are.
func TestRecoverRefused(t *testing.T) {
	edit := func(f func(doc *Document)) func(*relic, *fitting) {
		return func(r *relic, _ *fitting) { f(&r.doc) }
	}
	for name, tt := range map[string]struct {
		change func(r *relic, b *fitting)
		want   string // what differs
		says   string
		is     error
	}{
		"identifier":   {change: edit(func(doc *Document) { doc.Identifier = "x" }), want: "identifier"},
		"incarnation":  {change: edit(func(doc *Document) { doc.Incarnation++ }), want: "incarnation"},
		"size":         {change: edit(func(doc *Document) { doc.Size = 512 }), want: "size, backend size"},
		"block size":   {change: edit(func(doc *Document) { doc.BlockSize = 1024 }), want: "block size"},
		"is gone":      {change: edit(func(doc *Document) { doc.Index = 4 }), want: "state"},
		"backend size": {change: func(_ *relic, b *fitting) { b.size *= 2 }, want: "backend size"},
		"without trim": {change: func(_ *relic, b *fitting) { b.plain = true }, want: "backend trim"},
		"handed over": {change: edit(func(doc *Document) { doc.Version = DocumentVersion }),
			says: "what Device.Keep has returned"},
		"of another server": {
			change: edit(func(doc *Document) { doc.Version, doc.Remote = RemoteDocumentVersion, true }),
			says:   "no backend can take", is: errors.ErrUnsupported,
		},
		"no connections": {change: edit(func(doc *Document) { doc.Connections = nil }), says: "0 connections"},
		"slot":           {change: edit(func(doc *Document) { doc.Connections[0].Slot = -1 }), says: "slot -1"},
		"slot beyond": {change: edit(func(doc *Document) { doc.Connections[0].Slot = maxSlots - 1 }),
			says: "can't be read"},
		"files": {change: func(r *relic, _ *fitting) { r.files = r.files[1:] }, says: "came with 2 descriptors"},
		"no socket": {change: func(r *relic, _ *fitting) { r.files = []*os.File{r.files[2], r.files[1], r.files[2]} },
			says: "descriptor of connection 0"},
		"no wait": {change: func(r *relic, _ *fitting) {
			r.doc.DeadTimeout, r.doc.Connections[0].Use, r.doc.Connections[1].Use = 0, 0, 0
		}, says: "without Options.DeadTimeout"},
	} {
		t.Run(name, func(t *testing.T) {
			r := relicOf(t, 0, 0)
			was, b := *r, fits()
			connections := append([]HandedConnection(nil), r.doc.Connections...)
			before := r.Setting(3)
			tt.change(r, b)
			d, err := r.recover(t, b)
			if d != nil || err == nil || !strings.Contains(err.Error(), tt.says) {
				t.Fatalf("%v, %v", d, err)
			}
			if tt.is != nil && !errors.Is(err, tt.is) {
				t.Errorf("%v is no %v", err, tt.is)
			}
			if diff := cmp.Diff(tt.want, strings.Join(mismatches(err), ", ")); diff != "" {
				t.Errorf("%v (-want +got):\n%s", err, diff)
			}
			*r = was
			r.doc.Connections = connections
			if diff := cmp.Diff(before, r.Setting(3)); diff != "" || r.Dead(3) != 0 || r.stillLeft(t) != 2 {
				t.Errorf("%d are dead, %d stand still; the device was touched (-want +got):\n%s",
					r.Dead(3), r.stillLeft(t), diff)
			}
			if d, err = r.recover(t, fits()); err != nil {
				t.Fatal(err)
			}
			if kept, replaced := d.Recovered(); kept != 2 || replaced != 0 {
				t.Errorf("%d were kept, %d replaced", kept, replaced)
			}
			read(t, r.orphan.kernel[0])
			if err := d.Close(); err != nil {
				t.Error(err)
			}
			checkClean(t, r.Kernel)
		})
	}
}

// TestRecoverDeadTimeout has the kernel wait for a connection, which it would not have, before the
// only one is cut; and holds that nothing is needed where one goes on.
func TestRecoverDeadTimeout(t *testing.T) {
	for _, begun := range []uint32{0, 1} {
		r := relicOf(t, 1, begun)
		r.doc.DeadTimeout = 0
		if begun != 0 {
			r.options.DeadTimeout = 21 * time.Second
		}
		d, err := r.recover(t, fits())
		if err != nil {
			t.Fatal(err)
		}
		if want := r.options.DeadTimeout; d.DeadTimeout() != want || want != 0 && r.Setting(3).DeadConnTimeout != 21 {
			t.Errorf("it waits for %v, want %v; the kernel has %+v", d.DeadTimeout(), want, r.Setting(3))
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		checkClean(t, r.Kernel)
	}
}

// TestRecoverLease holds that the lease of the index keeps others from recovering the device.
func TestRecoverLease(t *testing.T) {
	r := relicOf(t, 0)
	r.doc.Leased = true
	claims := r.options.Client.Claims()
	lease, err := claims.TryLease(3)
	if err != nil {
		t.Fatal(err)
	}
	if err := lease.Note("left:x"); err != nil {
		t.Fatal(err)
	}
	if _, err := r.recover(t, fits()); !errors.Is(err, nbdnl.ErrBusy) {
		t.Errorf("leased by a process that lives: %v", err)
	}
	if err := lease.Leave(); err != nil {
		t.Fatal(err)
	}
	_, err = r.recover(t, fits())
	if diff := cmp.Diff([]string{"identifier"}, mismatches(err)); diff != "" {
		t.Errorf("another device: %v", err)
	}
	if lease, err = claims.TryLease(3); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(lease.Note("left:1"), lease.Leave()); err != nil {
		t.Fatal(err)
	}
	small := fits()
	small.size = 512
	if _, err := r.recover(t, small); err == nil {
		t.Error("a smaller backend was taken")
	}
	d, err := r.recover(t, fits())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := claims.TryLease(3); !errors.Is(err, nbdnl.ErrBusy) {
		t.Errorf("the device is not leased: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if got, err := claims.Leased(); len(got) > 0 || err != nil {
		t.Errorf("leased are %v: %v", got, err)
	}
	checkClean(t, r.Kernel)
}

// TestCut holds that exactly those connections are cut that are to be replaced, and that the others
// are as they were.
func TestCut(t *testing.T) {
	for _, begun := range [][]uint32{{0, 0}, {3, 0}, {1, 129}} {
		r := relicOf(t, begun...)
		kept := 0
		for range 2 {
			if err := r.doc.Cut(r.files); err != nil {
				t.Fatal(err)
			}
			kept = 0
			for i, n := range begun {
				hung, err := hungUp(r.kernel[i])
				if err != nil || hung != (n != 0) {
					t.Errorf("%v: connection %d is cut: %t, %v", begun, i, hung, err)
				}
				if n == 0 {
					kept++
				}
			}
		}
		if n := r.stillLeft(t); n != kept {
			t.Errorf("%v: %d stand still", begun, n)
		}
		d, err := r.recover(t, fits())
		if err != nil {
			t.Fatal(err)
		}
		if n, _ := d.Recovered(); n != kept {
			t.Errorf("%v: %d were kept", begun, n)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		checkClean(t, r.Kernel)
	}
	r := relicOf(t, 3)
	if err := r.doc.Cut(nil); err == nil {
		t.Error("cut without descriptors")
	}
	r.doc.Remote = true
	if err := r.doc.Cut(r.files); err != nil {
		t.Errorf("of another server: %v", err)
	}
	if hung, err := hungUp(r.kernel[0]); hung || err != nil {
		t.Errorf("it is cut, %v", err)
	}
}
