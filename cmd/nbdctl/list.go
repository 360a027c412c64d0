package main

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/urfave/cli/v2"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/quantity"
	"github.com/nbdctl/nbdctl/nbdnl"
)

func listCommand() *cli.Command {
	return &cli.Command{
		Name:  "list",
		Usage: "list the connected devices, also those of other programs",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "all", Usage: "also those that are idle or merely held open"},
			&cli.BoolFlag{Name: "json", Usage: "print a JSON array"},
		},
		OnUsageError: onUsageError,
		Action:       list,
	}
}

func list(c *cli.Context) error {
	if err := noArguments(c); err != nil {
		return err
	}
	ctx, stop := interruptible(c)
	defer stop()
	store, err := host.OpenStore()
	if err != nil {
		return err
	}
	devices, _, err := inventory(store)
	if c.Bool("all") {
		devices, _, err = inventoryAll(ctx, store)
	}
	if err != nil && devices == nil {
		return err
	}
	if err != nil {
		fmt.Fprintf(c.App.ErrWriter, "nbdctl: warning: %v\n", err)
	}
	views := []view{}
	for _, d := range devices {
		if d.connected() || c.Bool("all") {
			views = append(views, viewOf(d))
		}
	}
	if c.Bool("json") {
		return printJSON(c.App.Writer, views)
	}
	if err := printTable(c.App.Writer, views); err != nil {
		return err
	}
	for _, v := range views {
		if v.State == nbdnl.StateOrphaned.String() {
			fmt.Fprintf(c.App.ErrWriter, "nbdctl: %s is orphaned: %s\n", v.Name, orphanAdvice(v))
		}
		if v.Loss != nil {
			fmt.Fprintf(c.App.ErrWriter, "nbdctl: writes to %s were lost, the first %s\n", v.Name, lossNote(v.Loss))
		}
	}
	return nil
}

// orphanAdvice says what an orphan is and what to do about it.
func orphanAdvice(v view) string {
	if !v.Owner.Ours {
		return fmt.Sprintf("the program that served it has ended without disconnecting, all I/O on it fails; it may take it back when it "+
			"runs again, else nbdctl disconnect --force %s frees it", v.Name)
	}
	who := "the process that served it"
	if v.Owner.PID != nil {
		who = fmt.Sprintf("pid %d, which served it,", *v.Owner.PID)
	}
	return fmt.Sprintf("%s ended without disconnecting, all I/O on it fails; nbdctl disconnect %s frees it", who, v.Name)
}

// printTable prints the views for people. What is not known is a dash.
func printTable(w io.Writer, views []view) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "NAME\tSTATE\tSIZE\tBACKEND\tLABEL\tMODE\tCONNS\tBLOCK\tRO\tTIMEOUT\tOWNER\tSINCE")
	for _, v := range views {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", v.Name, v.shownState(), quantity.FormatSize(v.Size),
			printable(v.Backend), orDash(v.Label), orDash(v.Mode), connections(v), orDash(v.BlockSize), yesNo(v.ReadOnly),
			timeouts(v), owner(v), since(v.Since))
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
func connections(v view) string {
	if v.Serving == nil || v.Connections == nil || *v.Serving == *v.Connections {
		return orDash(v.Connections)
	}
	return fmt.Sprintf("%d/%d", *v.Serving, *v.Connections)
}

// timeouts is the request timeout, with that for dead connections if there is one.
func timeouts(v view) string {
	if v.Timeout == nil || v.DeadTimeout == nil {
		return "-"
	}
	s := quantity.FormatSeconds(time.Duration(*v.Timeout) * time.Second)
	if *v.DeadTimeout != 0 {
		s += "+" + quantity.FormatSeconds(time.Duration(*v.DeadTimeout)*time.Second)
	}
	return s
}

func owner(v view) string {
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
