package inventory

import (
	"fmt"
	"testing"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// TestStopped holds that the stop of the process that serves by ioctls, with which the kernel ends
// the device, is seen where it is known which process that is, and of no other device.
func TestStopped(t *testing.T) {
	const stopped, tracing, sleeping = "T (stopped)", "t (tracing stop)", "S (sleeping)"
	for _, tt := range []struct {
		name   string
		thread int // that the kernel names; 0: none, as before Linux 6.1
		pid    int // that it belongs to
		state  string
		change func(*host.Record)
		want   nbdnl.State
	}{
		{"runs", 4712, 4711, sleeping, nil, nbdnl.StateLive},
		{"stopped", 4712, 4711, stopped, nil, nbdnl.StateOrphaned},
		{"stopped by a debugger", 4712, 4711, tracing, nil, nbdnl.StateOrphaned},
		{"stopped, before Linux 6.1", 0, 4711, stopped, nil, nbdnl.StateOrphaned},
		{"runs, before Linux 6.1", 0, 4711, sleeping, nil, nbdnl.StateLive},
		{
			"by netlink", 4712, 4711, stopped,
			func(r *host.Record) { r.Mode = "netlink" }, nbdnl.StateLive,
		},
		{
			"not connected yet", 4712, 4711, stopped,
			func(r *host.Record) { r.Phase = host.PhaseConnecting }, nbdnl.StateConnecting,
		},
		{
			"in another pid namespace", 4712, 4711, stopped,
			func(r *host.Record) { r.PID = 3 }, nbdnl.StateLive,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := record(1, func(r *host.Record) { r.Mode = "ioctl" })
			if tt.change != nil {
				tt.change(&r)
			}
			m := newMachine(t, nbdnltest.Options{Devices: 2})
			m.write(m.Path("proc/4711/comm"), servingName+"\n")
			for _, id := range []int{4711, tt.thread} {
				m.write(m.Path(fmt.Sprintf("proc/%d/status", id)),
					fmt.Sprintf("Name:\tnbdctl\nState:\t%s\nTgid:\t%d\n", tt.state, tt.pid))
			}
			st := nbdnl.Status{Index: 1, State: nbdnl.StateLive, Mode: nbdnl.ModeUnknown, OwnerTID: tt.thread}
			if tt.thread != 0 {
				st.OwnerPID = tt.pid
			}
			m.put(r, false)
			entries, err := m.Store.Entries()
			if err != nil {
				t.Fatal(err)
			}
			d, _ := m.pair(st, entries)
			if d.Entry == nil || d.State() != tt.want {
				t.Fatalf("it is %s, want %s; the record %v", d.State(), tt.want, d.Entry)
			}
			alive := *d.View().Serving
			if orphaned := tt.want == nbdnl.StateOrphaned; orphaned != (alive == 0) || orphaned != d.View().Stopped {
				t.Errorf("%d connections are alive, stopped %t", alive, d.View().Stopped)
			}
		})
	}
}
