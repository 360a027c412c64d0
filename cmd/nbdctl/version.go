package main

import (
	"fmt"
	"regexp"
	"runtime/debug"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
)

func versionCommand() *cli.Command {
	return &cli.Command{
		Name:  "version",
		Usage: "say what was built: tag or commit, date, version of Go",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "json", Usage: "print a JSON object"},
		},
		OnUsageError: onUsageError,
		Action: func(c *cli.Context) error {
			if err := noArguments(c); err != nil {
				return err
			}
			info, _ := debug.ReadBuildInfo()
			b := buildOf(info)
			if c.Bool("json") {
				return printJSON(c.App.Writer, b)
			}
			_, err := fmt.Fprintln(c.App.Writer, b)
			return err
		},
	}
}

// A build says what a program was built from, as far as the Go command has recorded it. It is what
// version --json prints: each key is always there, null where the value is not known.
type build struct {
	// Version is the module's: a tag or, between tags, what Go makes of the commit and its date.
	Version *string `json:"version"`
	// Commit is whole from a checkout, and its first 12 digits from the module's version.
	Commit *string `json:"commit"`
	// Date is that of the commit.
	Date *time.Time `json:"date"`
	// Modified tells whether the checkout had other files than the commit.
	Modified *bool   `json:"modified"`
	Go       *string `json:"go"`
}

// pseudoVersion fits the version of a commit that has no tag (go.dev/ref/mod#pseudo-versions):
// its parts are the date, in UTC, and the first digits of the commit.
var pseudoVersion = regexp.MustCompile(`^v[0-9]+\.[0-9]+\.[0-9]+-(?:.*\.)?([0-9]{14})-([0-9a-f]{12})(?:\+|$)`)

// dirty ends the version that Go makes of a checkout with other files than the commit.
const dirty = "+dirty"

// buildOf reads what the Go command recorded; info is nil if it recorded nothing. With go install
// of a version that is the version only, with go build in a checkout all of it.
func buildOf(info *debug.BuildInfo) (b build) {
	if info == nil {
		return b
	}
	b.Go = known(info.GoVersion, info.GoVersion != "")
	version := info.Main.Version
	b.Version = known(version, version != "" && version != "(devel)")
	if m := pseudoVersion.FindStringSubmatch(version); m != nil {
		date, err := time.Parse("20060102150405", m[1])
		b.Date, b.Commit = known(date, err == nil), &m[2]
	}
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			b.Commit = known(s.Value, s.Value != "")
		case "vcs.time":
			if date, err := time.Parse(time.RFC3339, s.Value); err == nil {
				b.Date = &date
			}
		case "vcs.modified":
			b.Modified = known(s.Value == "true", true)
		}
	}
	return b
}

// String is a line for people.
func (b build) String() string {
	parts := []string{"nbdctl"}
	if b.Version != nil && !pseudoVersion.MatchString(*b.Version) {
		parts[0] += " " + strings.TrimSuffix(*b.Version, dirty)
	}
	if b.Commit != nil {
		parts = append(parts, fmt.Sprintf("commit %.12s", *b.Commit))
	}
	if b.Date != nil {
		parts = append(parts, b.Date.UTC().Format(time.RFC3339))
	}
	if b.Modified != nil && *b.Modified {
		parts = append(parts, "with changes")
	}
	if b.Version == nil && b.Commit == nil {
		parts = append(parts, "built from an unknown version")
	}
	if b.Go != nil {
		parts = append(parts, *b.Go)
	}
	return strings.Join(parts, ", ")
}

// known is a pointer to v, or nil.
func known[T any](v T, ok bool) *T {
	if !ok {
		return nil
	}
	return &v
}
