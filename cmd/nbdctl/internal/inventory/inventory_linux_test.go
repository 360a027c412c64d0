package inventory

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// TestStates holds what is said of device 1 by what the kernel shows and what a record says.
func TestStates(t *testing.T) {
	type says struct {
		State     nbdnl.State
		Ours      bool
		PID       int
		Connector string
	}
	ours := host.IdentifierPrefix + ":" + uuidOf(1)
	with := func(change func(*host.Record), dead bool) func(*machine) {
		return func(m *machine) {
			m.connect(1, ours)
			m.put(record(1, change), dead)
		}
	}
	phase := func(p host.Phase) func(*machine) { return with(func(r *host.Record) { r.Phase = p }, false) }
	live := says{nbdnl.StateLive, true, 4711, "pid 4711 (nbdctl), which serves memory"}
	in := func(s nbdnl.State) says { d := live; d.State = s; return d }
	unused := says{nbdnl.StateIdle, false, 0, "another program"}
	held := says{nbdnl.StateHeld, false, 0, "another program"}
	strange := says{nbdnl.StateLive, false, 4711, "pid 4711 (nbdctl)"}
	for _, tt := range []struct {
		name  string
		build func(m *machine)
		want  says
	}{
		{"idle", func(m *machine) {}, unused},
		{"idle, with the record of a process that ends", func(m *machine) { m.put(record(1, nil), false) },
			unused},
		{"held", func(m *machine) {
			_, release := m.Hold(1)
			m.Cleanup(release)
		}, held},
		{"live", with(nil, false), live},
		{"its process was killed", with(nil, true), in(nbdnl.StateOrphaned)},
		{"connecting, and without a number yet", with(func(r *host.Record) {
			r.Phase, r.Index = host.PhaseConnecting, nil
		}, false), in(nbdnl.StateConnecting)},
		{"degraded", phase(host.PhaseDegraded), in(nbdnl.StateDegraded)},
		{"waiting", phase(host.PhaseWaiting), in(nbdnl.StateWaiting)},
		{"disconnecting", phase(host.PhaseDisconnecting), in(nbdnl.StateDisconnecting)},
		{"in a phase of a newer nbdctl", phase("migrating"), live},
		{"without its record", func(m *machine) { m.connect(1, ours) },
			says{nbdnl.StateLive, true, 4711, "pid 4711 (nbdctl)"}},
		{"without its record, and its process has ended", func(m *machine) { m.connect(1, ours); m.owner(1, "cron") },
			says{nbdnl.StateOrphaned, true, 0, "another program"}},
		{"another's", func(m *machine) { m.connect(1, "other:1") }, strange},
		{"another's, on the index of a record", func(m *machine) {
			m.connect(1, "other:1")
			m.put(record(1, nil), false)
		}, strange},
		{"another's, which has left its lease", func(m *machine) {
			m.connect(1, "other:1")
			m.write(filepath.Join(m.Store.Dir(), "leases/nbd1"), "other:1\n")
		}, says{nbdnl.StateOrphaned, false, 0, "a program that has ended"}},
		{"another's, on an index that was leased before", func(m *machine) {
			m.connect(1, "other:2")
			m.write(filepath.Join(m.Store.Dir(), "leases/nbd1"), "other:1\n")
		}, strange},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newMachine(t, nbdnltest.Options{Devices: 2})
			tt.build(m)
			if _, err := os.Stat(m.Path("proc/4711")); err != nil {
				if _, err := os.Stat(m.Path("sys/block/nbd1/pid")); err == nil {
					m.owner(1, servingName)
				}
			}
			d, err := m.LookupIndex(t.Context(), 1)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, says{d.State(), d.Ours(), d.PID(), d.Connector()}); diff != "" {
				t.Error(diff)
			}
			all, _, err := m.All(t.Context())
			if err != nil || len(all) != 2 {
				t.Fatalf("%d devices, %v", len(all), err)
			}
			if diff := cmp.Diff(d.View(), all[1].View()); diff != "" {
				t.Errorf("in a list it is another:\n%s", diff)
			}
			connected, _, err := m.Connected()
			if want := d.Connected(); err != nil || len(connected) == 1 != want {
				t.Errorf("%d are connected, %v", len(connected), err)
			}
		})
	}
}

// TestMatches holds which record is that of a device by ioctls, on which the kernel keeps no mark.
func TestMatches(t *testing.T) {
	for _, tt := range []struct {
		name   string
		dead   bool
		comm   string            // of the process that the kernel names
		use    nbdnl.Incarnation // of the device
		change func(*host.Record)
		want   bool
	}{
		{"its process", false, "nbdctl", 7, nil, true},
		{"its process, which has another number here", false, "nbdctl", 7, func(r *host.Record) { r.PID = 3 }, true},
		{"another program's process", false, "nbd-client", 7, func(r *host.Record) { r.PID = 3 }, false},
		{"a process that was killed", true, "nbdctl", 7, nil, false},
		{"of a former use of the index", false, "nbdctl", 8, nil, false},
		{"that tells no use of it", false, "nbdctl", 8, func(r *host.Record) { r.Incarnation = 0 }, true},
		{"by netlink", false, "nbdctl", 7, func(r *host.Record) { r.Mode = "netlink" }, false},
		{"of another index", false, "nbdctl", 7, func(r *host.Record) { *r.Index = 0 }, false},
		{"that connects", false, "nbdctl", 7, func(r *host.Record) { r.Index = nil }, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newMachine(t, nbdnltest.Options{Devices: 2})
			m.incarnation = func(int) nbdnl.Incarnation { return tt.use }
			m.ConnectIoctl(1, 1<<20)
			m.owner(1, tt.comm)
			m.put(record(1, func(r *host.Record) {
				r.Mode, r.Incarnation = "ioctl", 7
				if tt.change != nil {
					tt.change(r)
				}
			}), tt.dead)
			devices, rest, err := m.Inventory.Connected()
			if err != nil || len(devices) != 1 {
				t.Fatalf("%d devices, %v", len(devices), err)
			}
			d := devices[0]
			if got := d.Entry != nil; got != tt.want || d.Ours() != tt.want || (len(rest) == 0) != tt.want {
				t.Errorf("it has the record: %v, want %v; %d records are left", got, tt.want, len(rest))
			}
			if d.Incarnation != tt.use && d.Incarnation != 7 {
				t.Errorf("its incarnation is %d", d.Incarnation)
			}
		})
	}
}

// TestLookup holds what a name means.
func TestLookup(t *testing.T) {
	m := newMachine(t, nbdnltest.Options{Devices: 4})
	label := func(name string, since int) func(*host.Record) {
		return func(r *host.Record) {
			r.Spec.Label, r.Since = name, r.Since.Add(time.Duration(since)*time.Minute)
		}
	}
	for n := byte(0); n < 3; n++ {
		m.connect(int(n), host.IdentifierPrefix+":"+uuidOf(n))
	}
	m.put(record(0, label("twice", 0)), true)
	m.put(record(1, label("twice", 1)), false)
	m.put(record(2, label("orphan", 0)), true)
	m.put(record(5, func(r *host.Record) { r.Index, r.Phase, r.Spec.Label = nil, host.PhaseConnecting, "soon" }), false)
	for _, tt := range []struct {
		name  string
		index int
		code  exit.Code
		says  string
	}{
		{"twice", 1, exit.OK, ""}, // the one that lives
		{"orphan", 2, exit.OK, ""},
		{"nbd0", 0, exit.OK, ""},
		{"/dev/nbd3", 3, exit.OK, ""},
		{"2", 2, exit.OK, ""},
		{"nbd9", 0, exit.NotFound, "there is no device nbd9"},
		{"nobody", 0, exit.NotFound, "there is no device nobody"},
		{"soon", 0, exit.Busy, "soon is being connected by pid 4711"},
		{"", 0, exit.Usage, "must be a device"},
	} {
		d, err := m.Lookup(t.Context(), tt.name)
		if exit.Of(err) != tt.code || err != nil && !strings.Contains(err.Error(), tt.says) || d.Index != tt.index {
			t.Errorf("%q is device %d, code %d, %v; want %d, code %d, %q",
				tt.name, d.Index, exit.Of(err), err, tt.index, tt.code, tt.says)
		}
	}
}

// TestNoDriver holds that without a driver there are no devices, which is no error, and that
// records are shown all the same.
func TestNoDriver(t *testing.T) {
	m := newMachine(t, nbdnltest.Options{NoModule: true})
	m.put(record(1, nil), true)
	for name, list := range map[string]func() ([]Device, []host.Entry, error){
		"connected": m.Inventory.Connected,
		"all":       func() ([]Device, []host.Entry, error) { return m.All(t.Context()) },
	} {
		if devices, rest, err := list(); devices == nil || len(devices) != 0 || len(rest) != 1 || err != nil {
			t.Errorf("%s: %v, %d records, %v", name, devices, len(rest), err)
		}
	}
	for _, name := range []string{"nbd1", "label"} {
		if _, err := m.Lookup(t.Context(), name); exit.Of(err) != exit.NotFound {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestDamaged holds that a record which can't be read hides no device, and is told.
func TestDamaged(t *testing.T) {
	m := newMachine(t, nbdnltest.Options{Devices: 2})
	m.connect(1, host.IdentifierPrefix+":"+uuidOf(1))
	m.put(record(1, nil), false)
	m.write(filepath.Join(m.Store.Dir(), uuidOf(2), "state.json"), "{")
	devices, _, err := m.Inventory.Connected()
	if len(devices) != 1 || devices[0].Entry == nil || err == nil || !strings.Contains(err.Error(), uuidOf(2)) {
		t.Errorf("%v, %v", devices, err)
	}
}

// TestSweep holds that the records of killed processes go, but for those of devices that are there.
func TestSweep(t *testing.T) {
	m := newMachine(t, nbdnltest.Options{Devices: 3})
	m.connect(0, host.IdentifierPrefix+":"+uuidOf(0))
	m.put(record(0, nil), true)  // an orphan
	m.put(record(1, nil), true)  // of a device that is gone
	m.put(record(2, nil), false) // whose process lives
	if err := m.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	entries, err := m.Store.Entries()
	var left []string
	for _, e := range entries {
		left = append(left, e.UUID)
	}
	if diff := cmp.Diff(fmt.Sprint([]string{uuidOf(0), uuidOf(2)}), fmt.Sprint(left)); err != nil || diff != "" {
		t.Errorf("%v %s", err, diff)
	}
}

// TestFull holds what is told of a device whose process does not answer, and of one that nobody
// connected.
func TestFull(t *testing.T) {
	m := newMachine(t, nbdnltest.Options{Devices: 3})
	m.connect(0, host.IdentifierPrefix+":"+uuidOf(0))
	m.put(record(0, func(r *host.Record) { r.Log = "/run/nbdctl/log" }), false)
	t.Cleanup(m.Mount(0, "/mnt"))
	full, err := m.Full(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	if len(full.Holders) != 1 || !strings.Contains(full.Holders[0], "/mnt") || *full.Log != "/run/nbdctl/log" ||
		full.Traffic != nil || exit.Of(full.Unanswered) != exit.NotFound {
		t.Errorf("%+v", full)
	}
	_, release := m.Hold(1)
	t.Cleanup(release)
	for index, says := range map[int]string{
		1: "nbd1 is not connected, though something has it open",
		2: "nbd2 is not connected",
	} {
		if _, err := m.Full(t.Context(), index); exit.Of(err) != exit.NotFound || err.Error() != says {
			t.Errorf("%v, want %s", err, says)
		}
	}
}

// TestOldRecord holds what is shown of a device that an older nbdctl serves.
func TestOldRecord(t *testing.T) {
	m := newMachine(t, nbdnltest.Options{Devices: 2})
	content, err := os.ReadFile("../host/testdata/951cde1/changed.json")
	if err != nil {
		t.Fatal(err)
	}
	var r host.Record
	if err := json.Unmarshal(content, &r); err != nil {
		t.Fatal(err)
	}
	m.connect(0, r.Identifier)
	m.put(r, false)
	m.write(filepath.Join(m.Store.Dir(), r.UUID, "state.json"), string(content))
	devices, _, err := m.Inventory.Connected()
	if err != nil || len(devices) != 1 {
		t.Fatalf("%d devices, %v", len(devices), err)
	}
	v := devices[0].View()
	since, _ := time.Parse(time.RFC3339, "2026-11-29T04:23:25.565Z")
	want := View{
		Name: "nbd0", Path: "/dev/nbd0", State: "live", Size: 1 << 20, // the kernel's
		BlockSize: known(512, true), Label: known("scratch", true), Backend: known("memory", true),
		Mode:        known("netlink", true),
		Connections: known(2, true), Serving: known(2, true), ReadOnly: known(false, true), Features: []string{},
		Timeout: known(int64(40), true), DeadTimeout: known(int64(7), true), Identifier: known(r.Identifier, true),
		Since: &since, Owner: Owner{PID: known(r.PID, true), Ours: true}, Restart: &Restart{},
	}
	if diff := cmp.Diff(want, v); diff != "" {
		t.Error(diff)
	}
}

// TestNewerRecord holds that a record of a newer version is shown as far as it is understood, and
// that the device of one which can't be read is ours all the same.
func TestNewerRecord(t *testing.T) {
	for content, says := range map[string]string{
		`{"version": 2, "uuid": %q, "identifier": "nbdctl:%[1]s", "index": 1, "phase": "migrating", "spec": {}}`: "",
		`{"version": 2, "uuid": %q}`:              "",
		`{"version": 2, "uuid": %q, "index": {}}`: "is of version 2, of which this nbdctl knows up to 1",
	} {
		m := newMachine(t, nbdnltest.Options{Devices: 2})
		m.connect(1, host.IdentifierPrefix+":"+uuidOf(1))
		m.owner(1, servingName)
		m.put(record(1, nil), false)
		m.write(filepath.Join(m.Store.Dir(), uuidOf(1), "state.json"), fmt.Sprintf(content, uuidOf(1)))
		devices, _, err := m.Inventory.Connected()
		if len(devices) != 1 || (err == nil) != (says == "") || err != nil && !strings.Contains(err.Error(), says) {
			t.Fatalf("%s: %d devices, %v; want %q", content, len(devices), err, says)
		}
		d, err := m.Lookup(t.Context(), "nbd1")
		if v := d.View(); err != nil || !v.Owner.Ours || v.State != "live" {
			t.Errorf("%s: it shows as %+v, %v", content, v, err)
		}
		if _, err := m.Full(t.Context(), 1); err != nil {
			t.Errorf("%s: %v", content, err)
		}
	}
}
