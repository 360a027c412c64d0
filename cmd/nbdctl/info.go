package main

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/nbdctl/nbdctl/backends/nbd"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/quantity"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/survey"
)

func infoCommand() *cli.Command {
	return &cli.Command{
		Name:      "info",
		Usage:     "show what an NBD server offers",
		ArgsUsage: "URI",
		Description: "URI is nbd://HOST[:PORT][/EXPORT], nbd+unix:///[EXPORT]?socket=PATH or\n" +
			"nbd+vsock://CONTEXT[:PORT][/EXPORT], with nbds in place of nbd for TLS. Without an export,\n" +
			"all are shown that the server lists.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "json", Usage: "print JSON"},
			&cli.StringFlag{Name: "map", Usage: "show the extents of an export in the meta context `CONTEXT`, " +
				"such as base:allocation or qemu:dirty-bitmap:NAME"},
			&cli.StringFlag{Name: "timeout", Value: "10s", Usage: "how long it may take to answer, from 1s to 1h"},
		},
		OnUsageError: onUsageError,
		Action:       info,
	}
}

func info(c *cli.Context) error {
	if c.NArg() != 1 {
		return exit.Usagef("info takes one URI, such as nbd://localhost/disk")
	}
	u, err := nbd.ParseURI(c.Args().First())
	if err != nil {
		return exit.Usagef("%w", err)
	}
	patience, err := quantity.ParseSeconds(c.String("timeout"), time.Second, time.Hour)
	if err != nil {
		return exit.Usagef("--timeout: %w", err)
	}
	ctx, stop := interruptible(c)
	defer stop()
	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("%v has not answered within %v", u, patience))
	defer cancel()
	if c.IsSet("map") {
		return printMap(ctx, c, u, c.String("map"))
	}
	s, err := survey.Look(ctx, u)
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return printJSON(c.App.Writer, s)
	}
	return printServer(c.App.Writer, s)
}

// printServer prints what a server has for people.
func printServer(w io.Writer, s *survey.Server) error {
	security := "no TLS"
	if s.TLS != nil {
		security = *s.TLS
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "%s: %s, %s replies, exports: %d\n", s.URI, security, s.Replies, len(s.Exports))
	for _, e := range s.Exports {
		line := func(key, value string) { fmt.Fprintf(t, "  %s\t%s\n", key, value) }
		fmt.Fprintf(t, "export %q\n", e.Name)
		line("description", printable(e.Description))
		line("size", fmt.Sprintf("%s (%d bytes)", quantity.FormatSize(e.Size), e.Size))
		line("read-only", yesNo(&e.ReadOnly))
		line("flags", wordsOf(e.Flags))
		if b := e.BlockSize; b != nil {
			line("block size", fmt.Sprintf("at least %d, better %d, at most %d", b.Minimum, b.Preferred, b.Maximum))
		} else {
			line("block size", "-")
		}
		line("contexts", wordsOf(e.Contexts))
	}
	return t.Flush()
}

// wordsOf has words for people; those that would not be one are quoted.
func wordsOf(words []string) string {
	if len(words) == 0 {
		return "-"
	}
	shown := make([]string, len(words))
	for i, word := range words {
		if shown[i] = printable(&word); strings.Contains(word, " ") {
			shown[i] = strconv.Quote(word)
		}
	}
	return strings.Join(shown, " ")
}

// printMap prints the extents of an export as they come.
func printMap(ctx context.Context, c *cli.Context, u nbd.URI, name string) error {
	w := c.App.Writer
	if c.Bool("json") {
		pieces := []survey.Piece{}
		err := survey.Map(ctx, u, name, func(p survey.Piece) error {
			pieces = append(pieces, p)
			return nil
		})
		if err != nil {
			return err
		}
		return printJSON(w, pieces)
	}
	t := tabwriter.NewWriter(w, 12, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "OFFSET\tLENGTH\tFLAGS\t  MEANING")
	err := survey.Map(ctx, u, name, func(p survey.Piece) error {
		_, err := fmt.Fprintf(t, "%d\t%d\t%d\t  %s\n", p.Offset, p.Length, p.Flags, orDash(p.Meaning))
		return err
	})
	if err != nil {
		return err
	}
	return t.Flush()
}
