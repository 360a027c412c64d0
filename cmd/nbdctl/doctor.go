package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/doctor"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/inventory"
)

const doctorDescription = `
Prints a line for each check: its result (ok, warning, problem, or unknown for what could not be looked at), its name,
what was seen, why it matters, and what to do. For some of it nbdctl makes a device of a megabyte of memory, several
times, and removes it again; the kernel's log tells of it. The exit code is 0 if nothing is a problem; else 4 for want
of privilege, before 5 for want of a driver, before 1 for anything else.
`

func doctorCommand() *cli.Command {
	return &cli.Command{
		Name:        "doctor",
		Usage:       "find out what keeps devices from working on this machine, and what to do about it",
		Description: strings.TrimSpace(doctorDescription),
		Flags: []cli.Flag{
			&cli.BoolFlag{
				Name:  "fix",
				Usage: "also load the module, end devices of nbdctl whose process was killed, and remove their state",
			},
			&cli.BoolFlag{Name: "json", Usage: "print a JSON array"},
		},
		OnUsageError: onUsageError,
		Action:       examine,
	}
}

func examine(c *cli.Context) (err error) {
	if err := noArguments(c); err != nil {
		return err
	}
	in, err := inventory.Open()
	if err != nil {
		return err
	}
	if c.Bool("fix") {
		if err := privileged("doctor --fix"); err != nil {
			return err
		}
	}
	ctx, stop := interruptible(c)
	defer stop()
	m := &doctor.Machine{System: in.System, LoadModule: func() error { return loadDriver(ctx) }}
	checks := m.Checks(m.StateDirectory(in.Store.Dir()), devicesCheck(in), leftoversCheck(in))
	findings, err := examineAll(ctx, c, checks)
	if err = errors.Join(err, m.Close()); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return fmt.Errorf("doctor: %w", context.Cause(ctx))
	}
	return verdict(findings)
}

// examineAll makes the checks and prints what they find: for people each line
// as it comes, since some take a second.
func examineAll(ctx context.Context, c *cli.Context, checks []doctor.Check) ([]doctor.Finding, error) {
	var failed error
	findings := doctor.Examine(ctx, checks, c.Bool("fix"), func(f doctor.Finding) {
		if !c.Bool("json") {
			_, err := fmt.Fprintln(c.App.Writer, f)
			failed = errors.Join(failed, err)
		}
	})
	if c.Bool("json") {
		failed = printJSON(c.App.Writer, findings)
	}
	return findings, failed
}

// verdict is the error that gives the exit code.
func verdict(findings []doctor.Finding) error {
	code := doctor.Code(findings)
	if code == exit.OK {
		return nil
	}
	var problems []string
	for _, f := range findings {
		if f.Result == doctor.Problem && !slices.Contains(problems, f.Check) {
			problems = append(problems, f.Check)
		}
	}
	return exit.With(code, "doctor: problems with %s", strings.Join(problems, ", "))
}
