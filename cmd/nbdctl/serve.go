package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exports"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/server"
	"github.com/nbdctl/nbdctl/server/certs"
)

const serveDescription = `
Prints the NBD URIs once it listens, and serves until interrupted: then every request that was received is
answered and written data are made durable. Without --tls-certificates it neither asks who a client is
nor encrypts: who can reach the socket has the data. SIGHUP reads --exports and --tls-certificates again.
`

func serveCommand() *cli.Command {
	return &cli.Command{
		Name:         "serve",
		Usage:        "offer backends to NBD clients, without a device",
		ArgsUsage:    "KIND [ARG] | --exports FILE",
		Description:  strings.TrimSpace(serveDescription) + "\n\n" + backends(),
		Flags:        append(serveFlags, backendFlags...),
		OnUsageError: onUsageError,
		Action:       serve,
	}
}

func serve(c *cli.Context) (err error) {
	before, err := host.Succeeding()
	if err != nil {
		return err
	}
	p, err := servePlanOf(c, before != nil)
	if err != nil {
		return err
	}
	signals, stop := host.Signals()
	defer stop()
	log := &lockedWriter{w: c.App.ErrWriter}
	logger := slog.New(slog.NewTextHandler(log, nil))
	d := &daemon{
		plan: p, set: exports.New(log), logger: logger, before: before,
		reloading: make(chan struct{}, 1), passing: make(chan struct{}, 1), successor: make(chan *host.Successor, 1),
	}
	d.ended, d.end = context.WithCancel(c.Context)
	defer d.end()
	if before != nil {
		err = d.succeed(c.Context)
	} else {
		err = d.begin(c.App.Writer, func(warnings []string) { warn(c, warnings) })
	}
	if err != nil {
		return err
	}
	next, err := d.run(signals)
	if next == nil {
		return errors.Join(err, d.shutdown())
	}
	left := make(chan struct{})
	go func() {
		d.leave()
		close(left)
	}()
	if code := next.Wait(signals, left, logger); code != 0 {
		os.Exit(code) // It has said why.
	}
	return nil
}

// A daemon is the process that serves exports, while it does.
type daemon struct {
	plan   *servePlan
	set    *exports.Set
	certs  *certs.Folder // nil: no TLS
	server *server.Server
	logger *slog.Logger

	listeners []net.Listener
	control   *host.ExportsControl // nil: nobody is answered

	before    *host.Succession // how it came to serve; nil: by itself
	successor chan *host.Successor
	reloads   sync.WaitGroup  // that were asked for
	reloading chan struct{}   // holds a value while what is offered is read again
	passing   chan struct{}   // holds a value while it is handed over
	heir      *host.Successor // that serves; nil: this one does; set while both are held
	moved     atomic.Bool     // heir is there
	// ended is over when the server is about to end.
	ended context.Context
	end   context.CancelFunc
}

// begin opens what is to be offered, listens, and says where. If it fails, nothing is left.
func (d *daemon) begin(out io.Writer, warn func([]string)) error {
	offer, err := d.plan.offer()
	if err != nil {
		return err
	}
	if err := d.makeServer(); err != nil {
		return err
	}
	warnings, err := d.set.Load(offer)
	if err != nil {
		return err
	}
	warn(warnings)
	err = d.answer()
	if err == nil {
		err = d.listen(out)
	}
	if err != nil {
		for _, l := range d.listeners {
			err = errors.Join(err, l.Close())
		}
		if d.control != nil {
			d.control.Close()
		}
		return errors.Join(err, d.set.Discard())
	}
	return nil
}

// makeServer makes the server of the plan.
func (d *daemon) makeServer() (err error) {
	d.server = d.plan.server()
	d.server.Lookup, d.server.List, d.server.Logger = d.set.Lookup, d.set.List, d.logger
	if d.plan.tls != tlsOff {
		if d.certs, err = certs.Open(d.plan.certificates, d.plan.verifyPeer); err != nil {
			return err
		}
		d.server.TLS, d.server.RequireTLS = d.certs.Config(), d.plan.tls == tlsRequire
	}
	return nil
}

// answer lets stats and upgrade ask.
func (d *daemon) answer() error {
	if d.plan.control.network == "" {
		return nil
	}
	var l net.Listener
	var err error
	host.Privately(func() { l, err = listenUnix(d.plan.control.address) })
	if err != nil {
		return err
	}
	d.control = host.ControlExports(l, d.status, d.handOver)
	return nil
}

// status tells of the exports, as long as they are here.
func (d *daemon) status() ([]host.ExportStatus, error) {
	all := d.set.Status()
	if d.moved.Load() {
		return nil, host.ErrMoved
	}
	return all, nil
}

// listen prints a URI for each address and export.
func (d *daemon) listen(out io.Writer) error {
	addresses, err := d.bind()
	if err != nil {
		return err
	}
	names := d.set.Names()
	if len(names) == 0 {
		names = []string{""} // There are folders alone.
	}
	for _, a := range addresses {
		for _, name := range names {
			if _, err := fmt.Fprintln(out, exportURI(a, name, d.server.RequireTLS)); err != nil {
				return err
			}
		}
	}
	return nil
}

// bind has the listeners of the plan, and returns where they are.
func (d *daemon) bind() ([]net.Addr, error) {
	var addresses []net.Addr
	for _, l := range d.plan.activated {
		d.listeners = append(d.listeners, l)
		addresses = append(addresses, l.Addr())
	}
	for _, at := range d.plan.endpoints {
		l, a, err := at.listen()
		if err != nil {
			return nil, err
		}
		d.listeners = append(d.listeners, l)
		addresses = append(addresses, a)
	}
	return addresses, nil
}

// run serves until a signal ends it, or a listener fails, or another process serves in the place of
// this one.
func (d *daemon) run(signals <-chan os.Signal) (*host.Successor, error) {
	served := make(chan error, len(d.listeners))
	for _, l := range d.listeners {
		go func() { served <- d.server.Serve(l) }()
	}
	for {
		select {
		case err := <-served:
			if errors.Is(err, server.ErrServerClosed) {
				continue // It is being handed over.
			}
			return d.ending(nil), err
		case next := <-d.successor:
			return next, nil
		case sig := <-signals:
			if sig == syscall.SIGHUP && d.canReload() {
				d.reloads.Go(d.reload) // A disk may hang.
				continue
			}
			d.logger.Info("ending", "signal", sig.String())
			return d.ending(sig), nil
		}
	}
}

// ending has no handover begin, and one come to its end that is under way: it fails, unless it is
// done but for the last word. Then the successor gets the signal that has come.
func (d *daemon) ending(sig os.Signal) *host.Successor {
	d.end()
	d.passing <- struct{}{}
	defer func() { <-d.passing }()
	d.heir.Signal(sig, d.logger)
	return d.heir
}

// canReload reports whether there is something that can be read again.
func (d *daemon) canReload() bool { return d.certs != nil || d.plan.file != "" }

// reload reads certificates and exports again, after another one that is still at it. Each of the
// two stays as it is where that fails.
func (d *daemon) reload() {
	d.reloading <- struct{}{}
	defer func() { <-d.reloading }()
	if d.heir != nil {
		d.heir.Signal(syscall.SIGHUP, d.logger)
		return
	}
	if d.certs != nil {
		d.report("certificates", d.certs.Reload())
	}
	if d.plan.file == "" {
		return
	}
	offer, err := d.plan.offer()
	var warnings []string
	if err == nil {
		warnings, err = d.set.Load(offer)
	}
	d.report("exports", err)
	for _, w := range warnings {
		d.logger.Warn(w)
	}
}

func (d *daemon) report(what string, err error) {
	if err != nil {
		d.logger.Error("not read again; "+what+" stay as they are", slog.Any("err", err))
		return
	}
	d.logger.Info("read again", slog.String("what", what))
}

// drainPatience bounds the wait for clients that do not take their replies.
const drainPatience = 10 * time.Second

// shutdown answers what was received, and makes durable what was written.
func (d *daemon) shutdown() error {
	ctx, cancel := context.WithTimeout(context.Background(), drainPatience)
	defer cancel()
	err := d.server.Shutdown(ctx)
	if err != nil {
		err = errors.Join(err, d.server.Close())
		// Nobody is waited for any more but the backends, whose last calls are to end before they
		// do.
		ctx, cancel := context.WithTimeout(context.Background(), drainPatience)
		defer cancel()
		err = errors.Join(err, d.server.Shutdown(ctx))
	}
	if d.control != nil {
		d.control.Close()
	}
	return errors.Join(err, d.set.Close())
}

// leave waits for what was asked for and is passed on, for those who have asked something, and for
// the clients over TLS, whose connections are being closed.
func (d *daemon) leave() {
	d.reloads.Wait()
	if d.control != nil {
		d.control.Leave()
	}
	ctx, cancel := context.WithTimeout(context.Background(), drainPatience)
	defer cancel()
	if err := d.server.Shutdown(ctx); err != nil {
		d.logger.Warn("clients over TLS do not go", slog.Any("reason", err))
		_ = d.server.Close() // Nothing of theirs is in flight.
	}
}

// A lockedWriter is a log that several write to.
type lockedWriter struct {
	mu sync.Mutex
	w  io.Writer
}

func (l *lockedWriter) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}

// tlsMode is how clients may talk.
type tlsMode int

const (
	tlsOff tlsMode = iota
	tlsAllow
	tlsRequire
)

func tlsModeOf(c *cli.Context) (tlsMode, error) {
	dir := c.String("tls-certificates")
	mode := tlsOff
	if dir != "" {
		mode = tlsRequire
	}
	switch v := c.String("tls"); v {
	case "":
	case "off":
		mode = tlsOff
	case "allow":
		mode = tlsAllow
	case "require":
		mode = tlsRequire
	default:
		return mode, exit.Usagef("--tls %s: must be off, allow or require", v)
	}
	switch {
	case mode != tlsOff && dir == "":
		return mode, exit.Usagef("--tls %s: needs --tls-certificates, a folder with server-cert.pem and server-key.pem",
			c.String("tls"))
	case mode == tlsOff && c.Bool("tls-verify-peer"):
		return mode, exit.Usagef("--tls-verify-peer: there is no TLS; give --tls-certificates")
	case mode == tlsAllow && c.Bool("tls-verify-peer"):
		return mode, exit.Usagef("--tls-verify-peer: with --tls allow whoever has no certificate talks in plain text; " +
			"leave --tls out")
	}
	return mode, nil
}
