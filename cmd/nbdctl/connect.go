package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/inventory"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/kind"
)

// connectTimeout bounds a connect. It is far beyond what any takes: the kernel
// needs milliseconds, a first read from a slow store perhaps seconds.
const connectTimeout = 2 * time.Minute

func connectCommand() *cli.Command {
	return &cli.Command{
		Name:      "connect",
		Usage:     "make a backend a block device",
		ArgsUsage: "KIND [ARG]",
		Description: "Prints the path of the device once it is usable. A process in the background serves it.\n\n" +
			backends(),
		Flags: append([]cli.Flag{
			&cli.StringFlag{Name: "device", Usage: "connect `NBDN` (nbd5, /dev/nbd5 or 5) instead of any free one"},
			&cli.StringFlag{
				Name:  "connections",
				Value: "1",
				Usage: "connections to the kernel, `N` from 1 to 64; more than processors are of no use",
			},
			&cli.StringFlag{
				Name:  "timeout",
				Value: "30s",
				Usage: "fail a request that takes longer, 1s to 24h, whole seconds",
			},
			&cli.StringFlag{
				Name: "dead-timeout",
				Usage: "hold requests for so long after all connections died, 0s to 24h " +
					"(default: 60s if the serving process is restarted, else 0s)",
			},
			&cli.StringFlag{
				Name: "restart",
				Usage: "replace a serving process that dies, `N` times in ten minutes at most, or no " +
					"(default: 5, and no with --ioctl, --foreground or --dead-timeout 0s)",
			},
			&cli.StringFlag{Name: "name", Usage: "a `NAME` of your own for the device, to find it again"},
			&cli.BoolFlag{
				Name:  "ioctl",
				Usage: "connect by ioctls, as is done anyway where netlink is out of sight; no --dead-timeout then",
			},
			&cli.BoolFlag{Name: "foreground", Usage: "serve in the foreground until disconnected or interrupted"},
			&cli.BoolFlag{Name: "json", Usage: "print the device as JSON, as status --json does"},
		}, backendFlags...),
		OnUsageError: onUsageError,
		Action:       connect,
	}
}

// backends is the part of a help text that lists them.
func backends() string {
	var b strings.Builder
	b.WriteString("Backends:")
	for _, k := range kind.All {
		fmt.Fprintf(&b, "\n   %-10s %s", k.Synopsis, k.Summary)
	}
	return b.String()
}

func connect(c *cli.Context) error {
	spec, err := specOf(c)
	if err != nil {
		return err
	}
	in, err := inventory.Open()
	if err != nil {
		return err
	}
	if err := privileged("connect"); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(c.Context, connectTimeout,
		fmt.Errorf("no device within %s", connectTimeout))
	defer cancel()
	if err := loadDriver(ctx); err != nil {
		return err
	}
	if err := in.Sweep(ctx); err != nil {
		fmt.Fprintf(c.App.ErrWriter, "nbdctl: warning: cleaning up after dead processes: %v\n", err)
	}
	if err := vacant(ctx, in, spec); err != nil {
		return err
	}
	if c.Bool("foreground") {
		return connectForeground(c, in.Store, spec)
	}
	// A reader of our output that has gone is an error like any other here: the
	// connect is undone.
	signal.Ignore(syscall.SIGPIPE)
	defer signal.Reset(syscall.SIGPIPE)
	ctx, stop := signal.NotifyContext(ctx, host.Heeded(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)...)
	defer stop()
	spawned, warnings, err := host.Spawn(ctx, spec, imageDescriptor(spec))
	warn(c, warnings)
	if err != nil {
		return err
	}
	if err := printConnected(ctx, c, spawned.Record); err != nil {
		return errors.Join(err, spawned.Reject())
	}
	// The connect has succeeded: neither a late Ctrl-C nor the terminal's end may say otherwise.
	// Such signals are still taken, and go nowhere. With signal.Ignore the process would end if
	// another thread was about to handle one (runtime.sigfwdgo).
	signal.Notify(make(chan os.Signal, 1), host.Heeded(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)...)
	return spawned.Accept()
}

// vacant refuses a device that is connected already, naming who has it. The
// kernel has the last word; it only knows "busy".
func vacant(ctx context.Context, in *inventory.Inventory, spec host.Spec) error {
	if spec.Index == nil {
		return nil
	}
	d, err := in.LookupIndex(ctx, *spec.Index)
	if exit.Of(err) == exit.NotFound {
		return nil // it will be made
	}
	if err != nil || !d.Connected() {
		return err
	}
	return exit.With(exit.Busy, "--device: nbd%d is connected already, by %s; leave --device out to get any free one",
		d.Index, d.Connector())
}

// connectForeground serves in this process. A first Ctrl-C asks for an orderly
// end, which a held device refuses; a second one soon after ends it all the same.
func connectForeground(c *cli.Context, store *host.Store, spec host.Spec) error {
	host.Publish()
	signals, stop := host.Signals()
	defer stop()
	h := &host.Host{
		Store:   store,
		Spec:    spec,
		Open:    kind.Open,
		Signals: signals,
		Insist:  true,
		Tee:     c.App.ErrWriter,
		Ready: func(_ context.Context, r host.Record, warnings []string) error {
			warn(c, warnings)
			return printConnected(c.Context, c, &r)
		},
	}
	return h.Serve(c.Context)
}

// printConnected prints what connect promises: nothing but the device path, or
// the JSON object.
func printConnected(ctx context.Context, c *cli.Context, r *host.Record) error {
	if !c.Bool("json") {
		_, err := fmt.Fprintf(c.App.Writer, "/dev/%s\n", r.Device())
		return err
	}
	in, err := inventory.Open()
	if err != nil {
		return err
	}
	v, err := in.Full(ctx, *r.Index)
	if err != nil {
		return err
	}
	return printJSON(c.App.Writer, v)
}

func warn(c *cli.Context, warnings []string) {
	for _, w := range warnings {
		fmt.Fprintf(c.App.ErrWriter, "nbdctl: warning: %s\n", w)
	}
}
