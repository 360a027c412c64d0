package main

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/server"
)

// exportStats shows what the exports of a server have served, once or in each interval.
func exportStats(ctx context.Context, c *cli.Context, interval time.Duration) error {
	look := func() ([]host.ExportStatus, error) {
		all, err := host.AskExports(ctx, c.String("server"))
		if err != nil || c.NArg() == 0 {
			return all, err
		}
		return oneExport(all, c.Args().First())
	}
	before, err := look()
	if err != nil {
		return err
	}
	if !c.Bool("watch") {
		return printExports(c, exportViews(before, nil, 0))
	}
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for last := time.Now(); ; {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil // interrupted, which is how watching ends
		}
		now, err := look()
		switch {
		case ctx.Err() != nil, exit.Of(err) == exit.NotFound:
			return nil // The server, or its export, has gone.
		case err != nil:
			return err
		}
		at := time.Now()
		if err := printExports(c, exportViews(now, before, at.Sub(last))); err != nil {
			return err
		}
		before, last = now, at
	}
}

func oneExport(all []host.ExportStatus, name string) ([]host.ExportStatus, error) {
	for _, e := range all {
		if e.Name == name {
			return []host.ExportStatus{e}, nil
		}
	}
	var names []string
	for _, e := range all {
		names = append(names, fmt.Sprintf("%q", e.Name))
	}
	return nil, exit.With(exit.NotFound, "no export %q is open; there are %s", name, strings.Join(names, ", "))
}

// exportViews are what stats prints. With before they are of what was new in that time.
func exportViews(now, before []host.ExportStatus, took time.Duration) []*statsView {
	views := []*statsView{}
	for _, e := range now {
		counts := []server.Stats{e.Stats}
		if before != nil {
			earlier := []server.Stats{{}}
			if i := slices.IndexFunc(before, func(b host.ExportStatus) bool {
				return b.Name == e.Name && b.Since.Equal(e.Since) // It may have been opened anew.
			}); i >= 0 {
				earlier[0] = before[i].Stats
			}
			counts = between(earlier, counts)
		}
		v := statsOf(e.Name, counts)
		v.Seconds = known(took.Seconds(), before != nil)
		v.Clients = &e.Clients
		views = append(views, v)
	}
	return views
}

func printExports(c *cli.Context, views []*statsView) error {
	if c.Bool("json") {
		if c.Bool("watch") {
			return json.NewEncoder(c.App.Writer).Encode(views)
		}
		return printJSON(c.App.Writer, views)
	}
	for _, v := range views {
		if v.Name == "" {
			v.Name = `""`
		}
		if err := printStats(c.App.Writer, v); err != nil {
			return err
		}
	}
	return nil
}
