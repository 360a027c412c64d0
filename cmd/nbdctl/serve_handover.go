package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"syscall"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exports"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/server"
)

// handOver has a process of another program serve in the place of this one, with the same
// arguments, and returns its number. If that fails, this one serves, as before.
func (d *daemon) handOver(ctx context.Context, program *os.File) (pid int, err error) {
	if program == nil {
		return 0, errors.New("a handover without a program")
	}
	for _, lock := range []chan struct{}{d.passing, d.reloading} {
		select {
		case lock <- struct{}{}:
			defer func() { <-lock }()
		case <-ctx.Done():
			return 0, fmt.Errorf("what is offered is being read again, or handed over: %w", context.Cause(ctx))
		}
	}
	switch {
	case d.heir != nil:
		return 0, host.ErrMoved
	case d.ended.Err() != nil:
		return 0, errors.New("the server is ending")
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(d.ended, func() { cancel(errors.New("the server is ending")) })()
	next, err := host.Succeed(program, d.before)
	if err != nil {
		return 0, err
	}
	d.logger.Info("handing over", slog.Int("pid", next.PID()))
	if err := d.passTo(ctx, next); err != nil {
		d.logger.Warn("not handed over, goes on serving", slog.Any("reason", err))
		next.End()
		return 0, err
	}
	d.logger.Info("handed over", slog.Int("pid", next.PID()))
	d.heir = next
	d.moved.Store(true)
	d.successor <- next
	return next.PID(), nil
}

// errSilent is why a successor counts as the one that serves: it was told to, and has neither said
// otherwise nor gone.
var errSilent = errors.New("it has not said that it serves")

// passTo gives all to the successor.
func (d *daemon) passTo(ctx context.Context, next *host.Successor) error {
	talk := dialogue{next.Conn}
	if err := d.greet(ctx, talk); err != nil {
		return err
	}
	wait := holdPatience + d.plan.handshake()
	standing, cancel := limited(ctx, wait+readyPatience, "the new process is not ready")
	defer cancel()
	holding, cancel := limited(standing, wait, "requests and handshakes have not come to an end")
	defer cancel()
	held, err := d.server.Hold(holding)
	if err != nil {
		return err
	}
	handed, err := d.set.HandOver(holding)
	if err != nil {
		held.Release()
		return err
	}
	goOn := func() {
		handed.Resume()
		held.Release()
	}
	err = d.tell(standing, talk, held, handed)
	if err == nil || errors.Is(err, syscall.EPIPE) { // It has gone, and may have said why.
		err = talk.expect(standing, func(w word) bool { return w.Ready })
	}
	if err == nil {
		err = talk.say(standing, word{Go: true}) // What was not sent can't have been read.
	}
	if err != nil {
		goOn()
		return err
	}
	last, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), lastPatience, errSilent)
	defer cancel()
	err = talk.expect(last, func(w word) bool { return w.Serving })
	var said *saidError
	switch {
	case errors.As(err, &said): // that it has not begun
		goOn()
		return err
	case err != nil && !errors.Is(err, errSilent):
		// It has gone, and may have served a few requests before.
		for _, s := range held.Sessions() {
			s.NetConn().Close()
		}
		for _, nc := range held.Waiting() {
			nc.Close()
		}
		goOn()
		return fmt.Errorf("the new process has not begun to serve, and clients have lost their connections: %w", err)
	}
	d.leaveTo(held, handed)
	return nil
}

// greet waits for the successor to come up.
func (d *daemon) greet(ctx context.Context, talk dialogue) error {
	ctx, cancel := limited(ctx, helloPatience, "the new process has not come up")
	defer cancel()
	form := 0
	err := talk.expect(ctx, func(w word) bool { form = w.Hello; return form != 0 })
	if err == nil && form != successionForm {
		err = unknownForm(form)
	}
	return err
}

// leaveTo lets go of all that the successor has.
func (d *daemon) leaveTo(held *server.ServerHold, handed *exports.Handover) {
	for _, l := range d.listeners {
		keepFile(l)
	}
	if d.control != nil {
		keepFile(d.control.Listener())
	}
	if err := handed.Leave(); err != nil { // Nobody has anything of it closed that clients leave.
		d.logger.Warn("a backend was not left in order", slog.Any("reason", err))
	}
	held.Leave()
}

// tell sends all that there is.
func (d *daemon) tell(ctx context.Context, talk dialogue, held *server.ServerHold, handed *exports.Handover) error {
	l := legacy{Offer: handed.Offer, Exports: handed.All, Control: d.control != nil}
	number := make(map[*server.Export]int)
	for i, e := range handed.All {
		number[e.Export] = i
		l.Descriptors = append(l.Descriptors, len(e.Files))
	}
	var files []*os.File
	copies := 0
	defer func() {
		for _, f := range files[:copies] {
			f.Close()
		}
	}()
	listeners := d.listeners
	if d.control != nil {
		listeners = append(listeners[:len(listeners):len(listeners)], d.control.Listener())
	}
	for _, at := range listeners {
		f, err := fileOf(at)
		if err != nil {
			return err
		}
		files = append(files, f)
		copies++
		l.Listeners = append(l.Listeners, heldOf(at))
	}
	sessions, waiting := held.Sessions(), held.Waiting()
	l.Clients, l.Waiting = len(sessions), len(waiting)
	if err := talk.send(ctx, l, nil); err != nil {
		return err
	}
	for _, e := range handed.All {
		files = append(files, e.Files...)
	}
	for _, f := range files {
		if err := talk.send(ctx, struct{}{}, f); err != nil {
			return err
		}
	}
	for _, s := range sessions {
		nc := s.NetConn()
		n, ok := number[s.Export()]
		if !ok {
			return fmt.Errorf("a client of an export %q that is not offered", s.Agreement.Export)
		}
		if err := sendConn(ctx, talk, nc, heldClient{nc.LocalAddr().Network(), s.Agreement, n, s.Unread}); err != nil {
			return err
		}
	}
	for _, nc := range waiting {
		if err := sendConn(ctx, talk, nc, heldClient{Network: nc.LocalAddr().Network()}); err != nil {
			return err
		}
	}
	return nil
}

// sendConn sends what there is to know of a client, and a copy of its descriptor.
func sendConn(ctx context.Context, talk dialogue, nc net.Conn, client heldClient) error {
	f, err := fileOf(nc)
	if err != nil {
		return err
	}
	defer f.Close()
	return talk.send(ctx, client, f)
}
