package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/quantity"
	"github.com/nbdctl/nbdctl/server"
)

const statsDescription = `
Counts are since connect, or with --watch since the line before. A request's time runs from when it was received
to when its reply was ready: it is the backend's. 99% of the requests took no longer than p99. The last line says how
many requests wait, and the oldest for how long; if that grows, the backend hangs.

With --server it tells of the exports of nbdctl serve --control PATH: of all, or of the one that is named.
`

func statsCommand() *cli.Command {
	return &cli.Command{
		Name:        "stats",
		Usage:       "show how many requests a device or an export had and how long they took",
		ArgsUsage:   "DEVICE | --server PATH [EXPORT]",
		Description: strings.TrimSpace(statsDescription),
		Flags: []cli.Flag{
			&cli.BoolFlag{
				Name:  "watch",
				Usage: "print what was new in each interval, until interrupted or the device has gone",
			},
			&cli.StringFlag{Name: "interval", Value: "1s", Usage: "of --watch, 1s to 24h, whole seconds"},
			&cli.StringFlag{Name: "server", Usage: "ask the server whose --control is `PATH`"},
			&cli.BoolFlag{Name: "json", Usage: "print a JSON object, with --watch one a line; of exports an array of them"},
		},
		OnUsageError: onUsageError,
		Action:       stats,
	}
}

// A statsView is what stats --json prints: the sums, and each connection.
type statsView struct {
	Time time.Time `json:"time"`
	Name string    `json:"name"`
	// Seconds is what the counts cover, null since connect.
	Seconds *float64 `json:"seconds"`
	// Clients is of exports.
	Clients     *int             `json:"clients,omitempty"`
	Total       connectionView   `json:"total"`
	Connections []connectionView `json:"connections"`
}

type connectionView struct {
	Read        opView `json:"read"`
	Write       opView `json:"write"`
	Flush       opView `json:"flush"`
	Trim        opView `json:"trim"`
	WriteZeroes opView `json:"write_zeroes"`
	BlockStatus opView `json:"block_status"`
	Cache       opView `json:"cache"`
	InFlight    int    `json:"in_flight"`
	OldestNS    int64  `json:"oldest_ns"`
}

// An opView is about the requests of one kind; times are in nanoseconds.
type opView struct {
	Requests uint64 `json:"requests"`
	Bytes    uint64 `json:"bytes"`
	Errors   uint64 `json:"errors"`
	MeanNS   int64  `json:"mean_ns"`
	P50NS    int64  `json:"p50_ns"`
	P99NS    int64  `json:"p99_ns"`
	MaxNS    int64  `json:"max_ns"`
}

func stats(c *cli.Context) error {
	if c.IsSet("server") {
		if c.NArg() > 1 || c.String("server") == "" {
			return exit.Usagef("stats --server takes the path of a server's --control, " +
				"and the name of one export or none")
		}
	} else if c.NArg() != 1 || c.Args().First() == "" {
		return exit.Usagef("stats takes one device: nbd3, /dev/nbd3 or the name given at connect")
	}
	interval, err := readSeconds(c, "interval", time.Second)
	if err != nil {
		return err
	}
	if c.IsSet("interval") && !c.Bool("watch") {
		return exit.Usagef("--interval is of use with --watch only")
	}
	ctx, stop := interruptible(c)
	defer stop()
	if c.IsSet("server") {
		return exportStats(ctx, c, interval)
	}
	d, err := served(ctx, "stats", c.Args().First())
	if err != nil {
		return err
	}
	e := d.Entry
	if c.Bool("watch") {
		return watchStats(ctx, c, e, interval)
	}
	now, err := e.Stats(ctx)
	if err != nil {
		return err
	}
	v := statsOf(e.Device(), now)
	if c.Bool("json") {
		return printJSON(c.App.Writer, v)
	}
	return printStats(c.App.Writer, v)
}

// watchStats prints what happens between one look and the next.
func watchStats(ctx context.Context, c *cli.Context, e *host.Entry, interval time.Duration) error {
	lines := json.NewEncoder(c.App.Writer)
	tick := time.NewTicker(interval)
	defer tick.Stop()
	var before []server.Stats
	for last := time.Now(); ; {
		now, err := e.Stats(ctx)
		if ctx.Err() != nil {
			return nil // interrupted, which is how watching ends
		}
		if err != nil && before != nil && (e.Ended() || exit.Of(err) == exit.NotFound) {
			return nil // the device has gone, which is how watching ends too
		}
		if err != nil {
			return err
		}
		at := time.Now()
		if before != nil {
			v := statsOf(e.Device(), between(before, now))
			v.Seconds = known(at.Sub(last).Seconds(), true)
			if c.Bool("json") {
				err = lines.Encode(v)
			} else {
				err = printStats(c.App.Writer, v)
			}
			if err != nil {
				return err
			}
		}
		before, last = now, at
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// between is what the connections have counted after before.
func between(before, now []server.Stats) []server.Stats {
	d := make([]server.Stats, len(now))
	for i := range now {
		d[i].InFlight, d[i].Oldest = now[i].InFlight, now[i].Oldest
		if i >= len(before) {
			d[i] = now[i]
			continue
		}
		earlier := operations(&before[i])
		later := operations(&now[i])
		for j, op := range operations(&d[i]) {
			*op = server.OpStats{
				Requests: later[j].Requests - earlier[j].Requests,
				Bytes:    later[j].Bytes - earlier[j].Bytes,
				Errors:   later[j].Errors - earlier[j].Errors,
				Latency:  later[j].Latency.Since(&earlier[j].Latency),
			}
		}
	}
	return d
}

// operations are in the order of the views. The kernel knows the first five.
func operations(s *server.Stats) [7]*server.OpStats {
	return [...]*server.OpStats{&s.Read, &s.Write, &s.Flush, &s.Trim, &s.WriteZeroes, &s.BlockStatus, &s.Cache}
}

func statsOf(name string, connections []server.Stats) *statsView {
	v := &statsView{Time: time.Now(), Name: name, Connections: []connectionView{}}
	var total server.Stats
	for i := range connections {
		total.Add(&connections[i])
		v.Connections = append(v.Connections, connectionOf(&connections[i]))
	}
	v.Total = connectionOf(&total)
	return v
}

func connectionOf(s *server.Stats) connectionView {
	v := connectionView{InFlight: s.InFlight, OldestNS: s.Oldest.Nanoseconds()}
	for i, to := range v.operations() {
		from := operations(s)[i]
		*to = opView{
			Requests: from.Requests,
			Bytes:    from.Bytes,
			Errors:   from.Errors,
			MeanNS:   from.Latency.Mean().Nanoseconds(),
			P50NS:    from.Latency.Quantile(0.5).Nanoseconds(),
			P99NS:    from.Latency.Quantile(0.99).Nanoseconds(),
			MaxNS:    from.Latency.Max.Nanoseconds(),
		}
	}
	return v
}

func (v *connectionView) operations() [7]*opView {
	return [...]*opView{&v.Read, &v.Write, &v.Flush, &v.Trim, &v.WriteZeroes, &v.BlockStatus, &v.Cache}
}

// printStats prints a line for each operation that had requests.
func printStats(w io.Writer, v *statsView) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	total, per := "REQUESTS\tBYTES", 1.0
	if v.Seconds != nil {
		total, per = "REQUESTS/S\tBYTES/S", *v.Seconds
	}
	fmt.Fprintf(t, "%s %s\t%s\tERRORS\tMEAN\tP50\tP99\tMAX\n", v.Name, v.Time.Local().Format(time.TimeOnly), total)
	names := [...]string{"read", "write", "flush", "trim", "write zeroes", "block status", "cache"}
	idle := true
	for i, op := range v.Total.operations() {
		if op.Requests == 0 {
			continue
		}
		idle = false
		requests, bytes := float64(op.Requests)/per, float64(op.Bytes)/per
		fmt.Fprintf(t, "%s\t%.0f\t%s\t%d\t%s\t%s\t%s\t%s\n",
			names[i], requests, quantity.FormatSize(int64(bytes)), op.Errors,
			short(op.MeanNS), short(op.P50NS), short(op.P99NS), short(op.MaxNS))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	switch {
	case v.Total.InFlight > 0:
		_, err := fmt.Fprintf(w, "%d in flight, the oldest for %s\n", v.Total.InFlight, short(v.Total.OldestNS))
		return err
	case idle:
		_, err := fmt.Fprintln(w, "idle")
		return err
	}
	return nil
}

// short is a duration in nanoseconds with three digits.
func short(ns int64) string {
	d := time.Duration(ns)
	unit := time.Duration(1)
	for d/unit >= 1000 {
		unit *= 10
	}
	return d.Round(unit).String()
}
