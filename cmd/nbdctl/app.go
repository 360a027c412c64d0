package main

import (
	"context"
	"io"
	"os/signal"
	"syscall"

	"github.com/urfave/cli/v2"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/kind"
)

// exitCodes is the end of the help text. The README has the same table.
const exitCodes = `Exit codes:
   0  ok
   1  failure, also a backing object that can't be opened, or writes that were lost
   2  usage: what was typed is valid on no machine
   3  no such device or export, or not connected
   4  not permitted, also a device that is not ours, or certificates that are refused
   5  not supported on this machine (no driver, kernel too old)
   6  busy: device taken or in use, image locked, name taken`

// newApp is the command line. Data goes to stdout, everything else to stderr.
func newApp(stdout, stderr io.Writer) *cli.App {
	app := &cli.App{
		Name:        "nbdctl",
		Usage:       "block devices served from user space, through the kernel's NBD driver",
		Description: exitCodes,
		Writer:      stdout,
		ErrWriter:   stderr,
		// permute makes its flag a run of versionCommand.
		HideVersion: true,
		// helpCommand takes the place of the library's own.
		HideHelpCommand: true,
		Flags:           []cli.Flag{cli.HelpFlag, cli.VersionFlag},
		// A comma in an option's value is the user's.
		DisableSliceFlagSeparator: true,
		// Left to itself the library would print usage to stdout and exit on
		// its own terms, with its own codes.
		ExitErrHandler: func(*cli.Context, error) {},
		OnUsageError:   onUsageError,
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return unknownCommand(c.Args().First())
			}
			c.App.Writer = c.App.ErrWriter
			if err := cli.ShowAppHelp(c); err != nil {
				return err
			}
			return exit.Usagef("no command given")
		},
		CommandNotFound: func(*cli.Context, string) {},
		Commands: []*cli.Command{
			connectCommand(),
			listCommand(),
			statusCommand(),
			statsCommand(),
			disconnectCommand(),
			resizeCommand(),
			reconfigureCommand(),
			upgradeCommand(),
			attachCommand(),
			kickCommand(),
			watchCommand(),
			serveCommand(),
			infoCommand(),
			doctorCommand(),
			versionCommand(),
			helpCommand(),
			{
				Name:   host.Command,
				Hidden: true,
				Action: func(c *cli.Context) error {
					store, err := host.OpenStore()
					if err != nil {
						return err
					}
					return host.RunSpawned(c.Context, store, kind.Open, kind.Inherit)
				},
			},
		},
	}
	for _, c := range app.Commands {
		// The library hides a help command under each command. It takes a first
		// argument "help" or "h", which is a device's name here.
		c.HideHelpCommand = true
	}
	return app
}

// helpCommand shows what --help shows.
func helpCommand() *cli.Command {
	return &cli.Command{
		Name:         "help",
		Aliases:      []string{"h"},
		Usage:        "list the commands, or show help for one",
		ArgsUsage:    "[COMMAND]",
		OnUsageError: onUsageError,
		Action: func(c *cli.Context) error {
			name := c.Args().First()
			switch command := c.App.Command(name); {
			case c.NArg() > 1:
				return exit.Usagef("help takes one command; %q is too much", c.Args().Get(1))
			case c.NArg() == 0:
				return cli.ShowAppHelp(c)
			case command == nil || command.Hidden:
				return unknownCommand(name)
			}
			return cli.ShowCommandHelp(c, name)
		},
	}
}

func unknownCommand(name string) error {
	return exit.Usagef("unknown command %q; see nbdctl --help", name)
}

// onUsageError turns what the flag parser says into our kind of usage error.
func onUsageError(c *cli.Context, err error, isSubcommand bool) error {
	help := "nbdctl --help"
	if isSubcommand {
		help = "nbdctl " + c.Command.Name + " --help"
	}
	return exit.Usagef("%w; see %s", err, help)
}

// noArguments refuses what follows the flags of a command that takes nothing.
func noArguments(c *cli.Context) error {
	if c.Args().Present() {
		return exit.Usagef("%s takes no argument, got %q", c.Command.Name, c.Args().First())
	}
	return nil
}

// interruptible is c's context that Ctrl-C or SIGTERM ends.
func interruptible(c *cli.Context) (context.Context, context.CancelFunc) {
	return signal.NotifyContext(c.Context, host.Heeded(syscall.SIGINT, syscall.SIGTERM)...)
}
