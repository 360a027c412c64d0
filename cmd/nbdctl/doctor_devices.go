package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/doctor"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/inventory"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/holder"
)

// driverDirectory is there as long as the kernel has the driver, and /sys shows it.
const driverDirectory = "/sys/module/nbd"

// notLoaded tells whether the kernel has no driver at this moment. From Linux
// 6.12 on, merely to ask it for one would load the module.
func notLoaded() bool {
	_, err := os.Stat(driverDirectory)
	return err != nil
}

// noDevices returns nil if there is certainly no device of the driver below a root directory, or
// why that is not known. Where /sys is not mounted, a driver and its devices are hidden.
func noDevices(root string) error {
	entries, err := os.ReadDir(filepath.Join(root, "sys/block"))
	if err != nil {
		return fmt.Errorf("whether there are devices can't be seen: %w", err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "nbd") {
			return fmt.Errorf("%s is there, though %s is not", filepath.Join("/sys/block", e.Name()), driverDirectory)
		}
	}
	return nil
}

// connectedIfLoaded is in.Connected for who must not load the module.
func connectedIfLoaded(in *inventory.Inventory) (devices []inventory.Device, rest []host.Entry, err error) {
	if notLoaded() {
		entries, damaged := in.Store.Entries()
		return nil, entries, damaged
	}
	return in.Connected()
}

// devicesCheck tells what is connected, and how the devices of nbdctl fare.
func devicesCheck(in *inventory.Inventory) doctor.Check {
	return doctor.Check{Name: "devices", Look: func(ctx context.Context) []doctor.Finding {
		devices, _, err := connectedIfLoaded(in)
		if err != nil && devices == nil && !notLoaded() {
			return []doctor.Finding{{Result: doctor.Problem, Code: exit.Failure, Seen: err.Error()}}
		}
		var findings []doctor.Finding
		ours := 0
		var others []string
		for _, d := range devices {
			if d.Ended() {
				continue
			}
			if !d.Ours() {
				others = append(others, fmt.Sprintf("nbd%d by %s", d.Index, d.Connector()))
				continue
			}
			ours++
			if f, ill := illness(ctx, d); ill {
				findings = append(findings, f)
			}
		}
		if findings != nil {
			return findings
		}
		seen := fmt.Sprintf("%d of nbdctl, %d of other programs", ours, len(others))
		if others != nil {
			seen += ": " + strings.Join(others, ", ")
		}
		return []doctor.Finding{{Result: doctor.OK, Seen: seen}}
	}}
}

// illness is the finding about a device of ours that does not do well. Orphans
// have a check of their own.
func illness(ctx context.Context, d inventory.Device) (doctor.Finding, bool) {
	f := doctor.Finding{Result: doctor.Warning, Remedy: fmt.Sprintf("nbdctl status nbd%d", d.Index)}
	if v := d.View(); v.Remote != nil && v.Remote.Error != nil {
		f.Seen = remoteNote(v)
		f.Why = "the server is away, or what it offers is another export now; nbdctl tries again every few seconds"
		return f, true
	}
	switch d.State() {
	case nbdnl.StateDegraded:
		f.Seen = fmt.Sprintf("nbd%d is degraded: some of its connections are dead", d.Index)
		f.Why = "they are replaced when the backend has let go of what was on them"
	case nbdnl.StateWaiting:
		f.Seen = fmt.Sprintf("nbd%d is waiting: its connections are dead, and its requests wait for a new one", d.Index)
		f.Why = "it comes when the backend has let go of what was on the old ones, or requests fail"
	case nbdnl.StateDisconnecting:
		f.Seen = fmt.Sprintf("nbd%d was disconnected and is not free yet", d.Index)
		f.Why = "somebody has it open: " + users(ctx, d.Index)
	default:
		return f, false
	}
	return f, true
}

// leftoversCheck looks for what killed processes of nbdctl have left: devices
// that nobody serves, and records. Both are ours to remove.
func leftoversCheck(in *inventory.Inventory) doctor.Check {
	return doctor.Check{Name: "leftovers", Look: func(ctx context.Context) []doctor.Finding {
		devices, rest, err := connectedIfLoaded(in)
		var findings []doctor.Finding
		orphans := false // with a record
		for _, d := range devices {
			if d.Connected() && d.Ours() && d.State() == nbdnl.StateOrphaned {
				findings = append(findings, orphan(ctx, in, d))
				orphans = orphans || d.Entry != nil
			}
		}
		findings = append(findings, lingering(rest)...)
		dead := slices.ContainsFunc(rest, func(e host.Entry) bool { return !e.Alive })
		if dead || err != nil || !orphans && in.Store.Stale() {
			findings = append(findings, staleState(ctx, in, err))
		}
		if findings == nil {
			return []doctor.Finding{{Result: doctor.OK, Seen: "no killed process of nbdctl has left anything"}}
		}
		return findings
	}}
}

// orphan is the finding about a device of ours that nobody serves any more.
func orphan(ctx context.Context, in *inventory.Inventory, d inventory.Device) doctor.Finding {
	f := doctor.Finding{
		Result: doctor.Problem,
		Code:   exit.Failure,
		Seen:   fmt.Sprintf("nbd%d is orphaned: the process that served it%s was killed", d.Index, formerPID(d)),
		Why:    "every access to it fails, and its index is taken",
		Remedy: fmt.Sprintf("nbdctl disconnect nbd%d", d.Index),
	}
	if d.Stopped {
		f.Seen = fmt.Sprintf("nbd%d is orphaned: %s", d.Index, stoppedServer(d.Entry.PID))
		f.Remedy = fmt.Sprintf("nbdctl kick nbd%d", d.Index)
		return f
	}
	if holders, err := holder.Find(ctx, d.Index); err != nil || len(holders) > 0 {
		f.Seen += ", and it is in use: " + users(ctx, d.Index)
		f.Remedy = fmt.Sprintf("unmount or close it, then nbdctl disconnect nbd%d", d.Index)
		return f
	}
	if !d.HasIdentifier {
		// Without a mark in the kernel the device could be of another program that has
		// taken the index since. Only its user knows.
		return f
	}
	f.Fix = func() (string, error) {
		client, err := in.System.NewClient()
		if err != nil {
			return "", err
		}
		defer client.Close()
		ctx, cancel := context.WithTimeoutCause(ctx, fixPatience, fmt.Errorf("not within %s", fixPatience))
		defer cancel()
		if err := client.Detach(ctx, d.Index, nbdnl.DetachOptions{Identifier: d.Identifier, Dead: d.Unserved()}); err != nil {
			return "", err
		}
		return fmt.Sprintf("nbd%d disconnected", d.Index), in.Sweep(ctx)
	}
	return f
}

// formerPID tells the number that the process had, if it is known.
func formerPID(d inventory.Device) string {
	if d.PID() == 0 {
		return ""
	}
	return fmt.Sprintf(" (pid %d)", d.PID())
}

// fixPatience bounds the end of an orphan, on which nobody has anything to wait for.
const fixPatience = 30 * time.Second

// lingering are the findings about processes that serve and have no device any more.
func lingering(rest []host.Entry) (findings []doctor.Finding) {
	for _, e := range rest {
		if e.Alive && e.Phase != host.PhaseConnecting && !e.Ended() {
			findings = append(findings, doctor.Finding{
				Result: doctor.Warning,
				Seen:   fmt.Sprintf("pid %d still serves %s, though its device has gone", e.PID, e.Spec.Backend()),
				Why:    "it ends when its backend lets it, and keeps an image locked until then",
				Remedy: fmt.Sprintf("see what its backend waits for (%s)", e.Log),
			})
		}
	}
	return findings
}

// staleState is the finding about records that belong to no device.
func staleState(ctx context.Context, in *inventory.Inventory, damaged error) doctor.Finding {
	f := doctor.Finding{
		Result: doctor.Warning,
		Seen:   fmt.Sprintf("%s has records of processes that were killed, of devices that are gone", in.Store.Dir()),
		Why:    "they do no harm; the next nbdctl connect removes them",
		Remedy: "nbdctl doctor --fix",
	}
	if damaged != nil {
		f.Seen = strings.ReplaceAll(damaged.Error(), "\n", "; ")
		f.Why = "nbdctl does not know the device that this belongs to, if there is one"
	}
	f.Fix = func() (string, error) {
		if notLoaded() {
			// Without a driver no record belongs to a device. But a driver may be there and not
			// show.
			if err := noDevices("/"); err != nil {
				return "", err
			}
			return "records removed", in.Store.Sweep(ctx, func(host.Entry) bool { return false })
		}
		return "records removed", in.Sweep(ctx)
	}
	return f
}
