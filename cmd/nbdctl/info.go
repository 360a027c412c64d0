package main

import (
	"encoding/json"
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
	if c.IsSet("map") {
		look := func(yield func(survey.Piece) error) error {
			return survey.Map(ctx, u, c.String("map"), patience, yield)
		}
		if c.Bool("json") {
			return printMapJSON(c.App.Writer, look)
		}
		return printMap(c.App.Writer, look)
	}
	s, err := survey.Look(ctx, u, patience)
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

// printMap prints the extents of an export as they come: there may be very many.
func printMap(w io.Writer, look func(func(survey.Piece) error) error) error {
	const line = "%16v  %16v  %6v  %s\n"
	if _, err := fmt.Fprintf(w, line, "OFFSET", "LENGTH", "FLAGS", "MEANING"); err != nil {
		return err
	}
	return look(func(p survey.Piece) error {
		_, err := fmt.Fprintf(w, line, p.Offset, p.Length, p.Flags, orDash(p.Meaning))
		return err
	})
}

// printMapJSON prints them as an array, also as they come.
func printMapJSON(w io.Writer, look func(func(survey.Piece) error) error) error {
	before := "["
	err := look(func(p survey.Piece) error {
		text, err := json.Marshal(p)
		if err == nil {
			_, err = fmt.Fprintf(w, "%s\n  %s", before, text)
		}
		before = ","
		return err
	})
	if err != nil {
		return err
	}
	if before == "[" {
		_, err = fmt.Fprintln(w, "[]")
	} else {
		_, err = fmt.Fprintln(w, "\n]")
	}
	return err
}
