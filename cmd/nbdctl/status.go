package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/inventory"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/quantity"
	"github.com/nbdctl/nbdctl/nbdnl"
)

func statusCommand() *cli.Command {
	return &cli.Command{
		Name:      "status",
		Usage:     "show one device, who holds it, its traffic and its last error",
		ArgsUsage: "DEVICE",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "json", Usage: "print a JSON object"},
		},
		OnUsageError: onUsageError,
		Action:       status,
	}
}

func status(c *cli.Context) error {
	if c.NArg() != 1 || c.Args().First() == "" {
		return exit.Usagef("status takes one device: nbd3, /dev/nbd3 or the name given at connect")
	}
	ctx, stop := interruptible(c)
	defer stop()
	in, err := inventory.Open()
	if err != nil {
		return err
	}
	d, err := in.Lookup(ctx, c.Args().First())
	if err != nil {
		return err
	}
	if !d.Connected() {
		return d.NotConnected()
	}
	v, err := in.FullOf(ctx, d)
	if err == nil && exit.Of(v.Unanswered) == exit.NotFound { // It has ended meanwhile, or is about to.
		v, err = in.Full(ctx, d.Index)
	}
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return printJSON(c.App.Writer, v)
	}
	return printStatus(c.App.Writer, v)
}

// printStatus prints one fact a line.
func printStatus(w io.Writer, v *inventory.Full) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	line := func(key, value string) { fmt.Fprintf(t, "%s\t%s\n", key, value) }
	line("device", v.Path)
	line("state", v.State)
	line("size", fmt.Sprintf("%s (%d bytes)", quantity.FormatSize(v.Size), v.Size))
	line("block size", orDash(v.BlockSize))
	line("read-only", yesNo(v.ReadOnly))
	line("features", strings.Join(v.Features, " "))
	line("backend", printable(v.Backend))
	line("label", orDash(v.Label))
	line("mode", orDash(v.Mode))
	line("connections", connections(v.View))
	if v.Remote != nil {
		line("remote", remoteState(v.View))
		if v.Remote.Error != nil {
			line("remote error", remoteNote(v.View))
		}
	}
	line("timeout", timeouts(v.View))
	if v.Restart != nil {
		line("restart", restartNote(v.View))
	}
	line("identifier", orDash(v.Identifier))
	line("owner", owner(v.View))
	line("since", since(v.Since))
	line("log", orDash(v.Log))
	for _, h := range v.Holders {
		line("held by", h)
	}
	for i, s := range v.Traffic {
		line(fmt.Sprintf("connection %d", i), traffic(s))
	}
	if v.Loss != nil {
		line("loss", lossNote(v.Loss))
	}
	if e := v.LastError; e != nil {
		when := e.Time.Local().Format(time.DateTime)
		line("last error", fmt.Sprintf("%s: %s at %d, %d bytes: %s", when, e.Op, e.Offset, e.Length, e.Error))
	}
	if v.Unanswered != nil && !errors.Is(v.Unanswered, fs.ErrPermission) {
		line("note", v.Unanswered.Error())
	}
	if v.State == nbdnl.StateOrphaned.String() {
		line("note", orphanAdvice(v.View))
	}
	return t.Flush()
}

// traffic is what one connection has carried, without the operations that never came.
func traffic(t host.Traffic) string {
	var parts []string
	for _, op := range []struct {
		name string
		host.OpTraffic
	}{{"read", t.Read}, {"write", t.Write}, {"flush", t.Flush}, {"trim", t.Trim}, {"write zeroes", t.WriteZeroes}} {
		if op.Requests == 0 {
			continue
		}
		part := fmt.Sprintf("%s %d (%s)", op.name, op.Requests, quantity.FormatSize(int64(op.Bytes)))
		if op.Errors != 0 {
			part += fmt.Sprintf(", %d failed", op.Errors)
		}
		parts = append(parts, part)
	}
	if t.InFlight != 0 {
		parts = append(parts, fmt.Sprintf("%d in flight", t.InFlight))
	}
	if len(parts) == 0 {
		return "idle"
	}
	return strings.Join(parts, "; ")
}
