package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	contract "github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/kind"
	"github.com/nbdctl/nbdctl/server"
)

const serveDescription = `
Prints the NBD URI once it listens, and serves until interrupted: then every request that was received is
answered and written data are made durable. Neither asks who a client is nor encrypts: who can reach
the socket has the data.
`

func serveCommand() *cli.Command {
	return &cli.Command{
		Name:        "serve",
		Usage:       "offer a backend to NBD clients, without a device",
		ArgsUsage:   "KIND [ARG]",
		Description: strings.TrimSpace(serveDescription) + "\n\n" + backends(),
		Flags: append([]cli.Flag{
			&cli.StringFlag{
				Name: "listen",
				Usage: "where: `ADDRESS` is unix:PATH or tcp:HOST:PORT; " +
					"0.0.0.0 is all of IPv4, [::] all of IPv6, no HOST both",
			},
			&cli.StringFlag{Name: "name", Usage: "`NAME` of the export; clients that name none get it too"},
			&cli.StringFlag{Name: "description", Usage: "`TEXT` for people who list the exports, or ask for it"},
		}, backendFlags...),
		OnUsageError: onUsageError,
		Action:       serve,
	}
}

func serve(c *cli.Context) (err error) {
	spec, err := backendOf(c, 1)
	if err != nil {
		return err
	}
	at, err := parseEndpoint(c.String("listen"))
	if err != nil {
		return err
	}
	if err := checkExportString("name", c.String("name")); err != nil {
		return err
	}
	if err := checkExportString("description", c.String("description")); err != nil {
		return err
	}
	signals, stop := host.Signals()
	defer stop()
	backing, err := kind.OpenExport(spec)
	if err != nil {
		return err
	}
	redactor := spec.Secrets.Redactor()
	defer func() { err = redactor.Error(err) }()
	warn(c, redactor.Texts(backing.Warnings))
	logger := slog.New(slog.NewTextHandler(redactor.Writer(c.App.ErrWriter), nil))
	l, s, err := offer(c, spec, backing, at, logger)
	if err != nil {
		undo := backing.Close
		if backing.Discard != nil {
			undo = backing.Discard
		}
		return errors.Join(err, undo())
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	select {
	case err = <-served:
	case sig := <-signals:
		logger.Info("ending", "signal", sig.String())
	}
	return errors.Join(err, end(s, backing))
}

// offer listens and says so.
func offer(
	c *cli.Context,
	spec host.Spec,
	backing *host.Backing,
	at endpoint,
	logger *slog.Logger,
) (net.Listener, *server.Server, error) {
	export, err := server.NewExport(backing.Backend, server.Options{
		ReadOnly:    spec.ReadOnly,
		BlockSize:   spec.BlockSize,
		Description: c.String("description"),
		Logger:      logger,
	})
	if err != nil {
		return nil, nil, err
	}
	l, addr, err := at.listen()
	if err != nil {
		return nil, nil, err
	}
	name := c.String("name")
	s := &server.Server{Exports: map[string]*server.Export{"": export, name: export}, Logger: logger}
	if _, err := fmt.Fprintln(c.App.Writer, exportURI(addr, name)); err != nil {
		return nil, nil, errors.Join(err, l.Close())
	}
	return l, s, nil
}

// drainPatience bounds the wait for clients that do not take their replies.
const drainPatience = 10 * time.Second

// end answers what was received, and makes durable what was written.
func end(s *server.Server, backing *host.Backing) error {
	ctx, cancel := context.WithTimeout(context.Background(), drainPatience)
	defer cancel()
	err := s.Shutdown(ctx)
	if err != nil {
		err = errors.Join(err, s.Close())
	}
	if d := contract.Probe(backing.Backend); d.Syncer != nil {
		err = errors.Join(err, d.Syncer.Sync())
	}
	return errors.Join(err, backing.Close())
}
