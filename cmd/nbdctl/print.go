package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/inventory"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/quantity"
)

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// shownState is the state for people, who should see a loss without looking for it.
func shownState(v inventory.View) string {
	if v.Loss != nil {
		return v.State + ",loss"
	}
	return v.State
}

// lossNote says what was lost first.
func lossNote(l *host.Loss) string {
	return fmt.Sprintf("%s: %s", l.Time.Local().Format(time.DateTime), l.Error)
}

// remoteNote says what is wrong with the connections of a device to another server.
func remoteNote(v inventory.View) string {
	r := v.Remote
	if r.LostSince == nil {
		return fmt.Sprintf("%s has %d of %d connections to %s: %s", v.Name, r.Alive, r.Connections,
			printable(v.Backend), printable(r.Error))
	}
	what := "requests wait"
	if over := r.LostSince.Add(time.Duration(*v.DeadTimeout) * time.Second); time.Now().After(over) {
		what = "requests fail"
	}
	return fmt.Sprintf("%s has no connection to %s since %s, and %s: %s", v.Name, printable(v.Backend),
		since(r.LostSince), what, printable(r.Error))
}

// remoteState says how a device is connected to another server.
func remoteState(v inventory.View) string {
	r := v.Remote
	s := fmt.Sprintf("%s, %d of %d connections, %s replies", r.Way, r.Alive, r.Connections, r.Replies)
	if r.TLS {
		s += ", TLS"
	}
	if r.BlockSize > 1 {
		s += fmt.Sprintf(", blocks of %d bytes", r.BlockSize)
	}
	return fmt.Sprintf("%s, replaced %d", s, r.Replaced)
}

// orphanAdvice says what an orphan is and what to do about it.
func orphanAdvice(v inventory.View) string {
	if !v.Owner.Ours {
		return fmt.Sprintf("the program that served it has ended without disconnecting, all I/O on it fails; "+
			"it may take it back when it runs again, else nbdctl disconnect --force %s frees it", v.Name)
	}
	if v.Stopped {
		return fmt.Sprintf("%s, and the kernel has ended the device with that: all I/O on it fails; "+
			"nbdctl kick %s frees it", stoppedServer(*v.Owner.PID), v.Name)
	}
	who := "the process that served it"
	if v.Owner.PID != nil {
		who = fmt.Sprintf("pid %d, which served it,", *v.Owner.PID)
	}
	ended := who + " ended without disconnecting"
	if v.Restart != nil && v.Restart.GaveUp != nil {
		ended = v.Restart.GaveUp.Reason + ", and is not replaced any more"
	}
	if v.Attachable {
		waits := "all I/O on it fails"
		if v.Remote != nil && v.Remote.Way == host.Direct {
			waits = "I/O goes on until a connection is lost, for the kernel speaks with the server itself"
		} else if *v.DeadTimeout > 0 {
			waits = fmt.Sprintf("requests wait for %s and fail then",
				quantity.FormatSeconds(time.Duration(*v.DeadTimeout)*time.Second))
		}
		return fmt.Sprintf("%s; %s; nbdctl attach %s has it served again, nbdctl disconnect %[3]s frees it",
			ended, waits, v.Name)
	}
	return fmt.Sprintf("%s, all I/O on it fails; nbdctl disconnect %s frees it", ended, v.Name)
}

// endedAdvice says why a device has ended, and what to do about it.
func endedAdvice(v inventory.View) string {
	return fmt.Sprintf("%s; its index is free, and nbdctl disconnect %s takes it off this list",
		v.Restart.GaveUp.Reason, v.Name)
}

// restartNote says what becomes of a device when the serving process dies.
func restartNote(v inventory.View) string {
	r := v.Restart
	switch {
	case r.GaveUp != nil:
		return fmt.Sprintf("%s: %s", r.GaveUp.Time.Local().Format(time.DateTime), r.GaveUp.Reason)
	case r.By == nil:
		return "no"
	}
	by := fmt.Sprintf("a %s (pid %d)", *r.By, *r.PID)
	if r.Unit != nil {
		by = fmt.Sprintf("%s (%s, pid %d)", *r.By, *r.Unit, *r.PID)
	}
	return fmt.Sprintf("by %s, %d times in 10m at most; %d so far, %d undisturbed",
		by, r.Limit, r.Restarts, r.Undisturbed)
}

// stoppedServer says of the process that serves a device that it is stopped.
func stoppedServer(pid int) string { return fmt.Sprintf("pid %d, which serves it, is stopped", pid) }

// printTable prints the views for people. What is not known is a dash.
func printTable(w io.Writer, views []inventory.View) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "NAME\tSTATE\tSIZE\tBACKEND\tLABEL\tMODE\tCONNS\tBLOCK\tRO\tTIMEOUT\tOWNER\tSINCE")
	for _, v := range views {
		columns := []string{
			v.Name, shownState(v), quantity.FormatSize(v.Size), printable(v.Backend), orDash(v.Label), orDash(v.Mode),
			connections(v), orDash(v.BlockSize), yesNo(v.ReadOnly), timeouts(v), owner(v), since(v.Since),
		}
		fmt.Fprintln(t, strings.Join(columns, "\t"))
	}
	return t.Flush()
}

func orDash[T any](v *T) string {
	if v == nil {
		return "-"
	}
	return fmt.Sprint(*v)
}

// printable is *v, quoted if it has what would break a line or move a
// terminal's cursor: a path may contain anything.
func printable(v *string) string {
	if v != nil && strings.ContainsFunc(*v, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return strconv.Quote(*v)
	}
	return orDash(v)
}

func yesNo(v *bool) string {
	switch {
	case v == nil:
		return "-"
	case *v:
		return "yes"
	}
	return "no"
}

// connections is how many the device has, as "1/2" if some are dead.
func connections(v inventory.View) string {
	if v.Serving == nil || v.Connections == nil || *v.Serving == *v.Connections {
		return orDash(v.Connections)
	}
	return fmt.Sprintf("%d/%d", *v.Serving, *v.Connections)
}

// timeouts is the request timeout, with that for dead connections if there is one.
func timeouts(v inventory.View) string {
	if v.Timeout == nil || v.DeadTimeout == nil {
		return "-"
	}
	s := quantity.FormatSeconds(time.Duration(*v.Timeout) * time.Second)
	if *v.DeadTimeout != 0 {
		s += "+" + quantity.FormatSeconds(time.Duration(*v.DeadTimeout)*time.Second)
	}
	return s
}

func owner(v inventory.View) string {
	if v.Owner.Ours {
		return orDash(v.Owner.PID)
	}
	if v.Owner.PID == nil {
		return "-"
	}
	return fmt.Sprintf("%d (not ours)", *v.Owner.PID)
}

func since(t *time.Time) string {
	if t == nil {
		return "-"
	}
	return t.Local().Format(time.DateTime)
}
