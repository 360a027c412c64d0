package blockdev

import (
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// TestKeep holds what a keeper gets while the device is served, that it is told when that is out of
// date, and that what is does no harm.
func TestKeep(t *testing.T) {
	o := orphaned(t, nbdnltest.Options{}, 2)
	o.options.Recoverable = true
	d := o.adopt(t)
	read(t, o.kernel[0])
	read(t, o.kernel[1])
	doc, files, err := d.Keep()
	if err != nil {
		t.Fatal(err)
	}
	defer closeAll(files)
	if doc.Version != KeptDocumentVersion || len(doc.Connections) != 2 || len(files) != 3 || doc.Leased ||
		doc.Index != 3 || doc.Identifier != "left:1" || doc.Incarnation != o.e.incarnation || doc.Size != size ||
		doc.Timeout != 7*time.Second || doc.DeadTimeout != 9*time.Second || doc.Flags != o.e.flags {
		t.Errorf("%d files with %+v", len(files), doc)
	}
	records := []*record{recordOf(files[2], doc.Connections[0]), recordOf(files[2], doc.Connections[1])}
	for i, record := range records {
		awaitStill(t, record, i)
	}
	for name, adopt := range map[string]func() error{
		"Adopt": func() error {
			_, err := o.machine.takeOver(t.Context(), doc, nil, newElastic(), o.options, nil)
			return err
		},
		"AdoptRemote": func() error { return doc.isFor(true) },
	} {
		if err := adopt(); err == nil {
			t.Errorf("%s takes what is kept", name)
		}
	}

	for len(d.Changes()) > 0 {
		<-d.Changes()
	}
	o.hangUp(t, 0)
	for d.Outage().Replaced != 1 {
		<-d.Changes()
	}
	again, newer, err := d.Keep()
	if err != nil {
		t.Fatal(err)
	}
	defer closeAll(newer)
	if again.Connections[0].Use == doc.Connections[0].Use || again.Connections[1].Use != doc.Connections[1].Use {
		t.Errorf("the connections were %+v, and are %+v", doc.Connections, again.Connections)
	}
	awaitStill(t, recordOf(newer[2], again.Connections[0]), 0)
	if still, err := records[0].still(); still || err != nil {
		t.Errorf("a connection that is no more stands still, %v", err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if d.ledger.count != 0 {
		t.Errorf("%d slots are in use after the end", d.ledger.count)
	}
	// Nothing of the device is left: what it had is not held up by who keeps it.
	for i, c := range again.Connections {
		if still, err := recordOf(newer[2], c).still(); still || err != nil {
			t.Errorf("connection %d stands still after the end, %v", i, err)
		}
	}
	if _, _, err := d.Keep(); !errors.Is(err, nbdnl.ErrNotConnected) {
		t.Errorf("kept after the end: %v", err)
	}
	checkClean(t, o.Kernel)
}

// awaitStill waits until a connection stands still.
func awaitStill(t *testing.T, r *record, number int) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(10 * time.Second); ; <-tick.C {
		still, err := r.still()
		switch {
		case err != nil:
			t.Fatal(err)
		case still:
			return
		case time.Now().After(deadline):
			t.Fatalf("connection %d does not come to stand still", number)
		}
	}
}

// TestKeepHandedOver holds that who keeps what a process had that has handed the device over since
// takes nothing from its successor unseen.
func TestKeepHandedOver(t *testing.T) {
	r := &relic{orphan: orphaned(t, nbdnltest.Options{}, 2)}
	r.options.Recoverable = true
	old := r.adopt(t)
	read(t, r.orphan.kernel[0])
	var err error
	if r.doc, r.files, err = old.Keep(); err != nil {
		t.Fatal(err)
	}
	defer closeAll(r.files)
	h, err := old.HandOver(t.Context(), HandOverOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if n := r.stillLeft(t); n != 0 {
		t.Errorf("%d connections stand still in a handover", n)
	}
	if err := h.Complete(); err != nil {
		t.Fatal(err)
	}
	if n := r.stillLeft(t); n != 0 || r.Dead(3) != 0 {
		t.Errorf("%d connections stand still after the handover, %d are dead", n, r.Dead(3))
	}
	d, err := r.recover(t, fits())
	if err != nil {
		t.Fatal(err)
	}
	if kept, replaced := d.Recovered(); kept != 0 || replaced != 2 {
		t.Errorf("%d were kept, %d replaced", kept, replaced)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	checkClean(t, r.Kernel)
}

// TestKeepUnsupported holds what can't be kept.
func TestKeepUnsupported(t *testing.T) {
	o := orphaned(t, nbdnltest.Options{}, 1)
	if _, _, err := o.adopt(t).Keep(); err == nil || !strings.Contains(err.Error(), "Options.Recoverable") {
		t.Errorf("without a ledger: %v", err)
	}
}

// TestCloseKept holds that the kernel sees the end of a connection also if others keep its socket.
func TestCloseKept(t *testing.T) {
	o := orphaned(t, nbdnltest.Options{}, 2)
	f, err := o.e.links[0].conn.(*net.UnixConn).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	d := o.adopt(t)
	if _, err := o.kernel[0].Write(make([]byte, 28)); err != nil { // no request
		t.Fatal(err)
	}
	for d.Outage().Replaced != 1 {
		<-d.Changes()
	}
	if n := o.Commands(nbdnltest.Reconfigure); n != 1 || o.Dead(3) != 0 {
		t.Errorf("%d commands, %d connections are dead", n, o.Dead(3))
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	checkClean(t, o.Kernel)
}

// TestLedgerSlots holds that a slot is one connection's until nothing of that is left, and that
// more connections than slots do without.
func TestLedgerSlots(t *testing.T) {
	l, err := newLedger(1)
	if err != nil {
		t.Fatal(err)
	}
	var all []*entry
	uses := make(map[uint64]bool)
	for e := l.enter(); e != nil; e = l.enter() {
		if got := e.word().Load(); got != 1 || uses[e.use] || e.use == 0 {
			t.Errorf("slot %d begins with %d, use %d", e.number, got, e.use)
		}
		uses[e.use] = true
		e.word().Store(0)
		all = append(all, e)
	}
	if len(all) != minSlots {
		t.Errorf("%d slots, want %d", len(all), minSlots)
	}
	f, err := l.copy()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	left := all[7]
	stale := recordOf(f, HandedConnection{Slot: 7, Use: left.use})
	awaitStill(t, stale, 7)
	left.end()
	left.end()
	if still, err := stale.still(); still || err != nil {
		t.Errorf("a slot that was given back stands still, %v", err)
	}
	next := l.enter()
	if next == nil || next.number != 7 || l.enter() != nil {
		t.Fatalf("the slot that was given back: %+v", next)
	}
	next.word().Store(0)
	if still, err := stale.still(); still || err != nil {
		t.Errorf("a former use of the slot stands still, %v", err)
	}
	if err := l.close(); err != nil {
		t.Error(err)
	}
	if l.enter() != nil {
		t.Error("a ledger that is closed has a slot")
	}
	for _, e := range all {
		if e != left {
			e.word().Add(1) // A late worker: the memory is there until all have ended.
			e.end()
		}
	}
	if next.word().Add(1); next.ledger.count != 1 {
		t.Errorf("%d slots are in use", next.ledger.count)
	}
	next.end()
	var none *entry
	none.end()
	if err := f.Truncate(0); err == nil {
		t.Error("the file can be cut under who has it mapped")
	}
}
