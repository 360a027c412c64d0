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
	if d.gone {
		return 0, errors.New("it was handed over, or has ended; try again")
	}
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
	d.gone = true
	d.successor <- next
	return next.PID(), nil
}

// passTo gives all to the successor.
func (d *daemon) passTo(ctx context.Context, next *host.Successor) error {
	talk := dialogue{next.Conn}
	form := 0
	err := talk.expect(helloPatience, func(w word) bool { form = w.Hello; return form != 0 })
	if err == nil && form != successionForm {
		err = unknownForm(form)
	}
	if err != nil {
		return err
	}
	holding, cancel := context.WithTimeoutCause(ctx, holdPatience,
		fmt.Errorf("requests have not come to an end within %v", holdPatience))
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
	err = d.tell(talk, held, handed)
	if err == nil || errors.Is(err, syscall.EPIPE) { // It has gone, and may have said why.
		err = talk.expect(readyPatience, func(w word) bool { return w.Ready })
	}
	if err == nil {
		err = talk.say(word{Go: true}) // What was not sent can't have been read.
	}
	if err != nil {
		_ = talk.say(word{Error: err.Error()}) // It may have gone.
		handed.Resume()
		held.Release()
		return err
	}
	err = talk.expect(lastPatience, func(w word) bool { return w.Serving })
	if err != nil && !errors.Is(err, errSilent) {
		// It has gone, and may have served a few requests before.
		for _, s := range held.Sessions() {
			s.NetConn().Close()
		}
		handed.Resume()
		held.Release()
		return fmt.Errorf("the new process has not begun to serve, and clients have lost their connections: %w", err)
	}
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
	return nil
}

// tell sends all that there is.
func (d *daemon) tell(talk dialogue, held *server.ServerHold, handed *exports.Handover) error {
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
	if err := talk.send(l, nil); err != nil {
		return err
	}
	for _, e := range handed.All {
		files = append(files, e.Files...)
	}
	for _, f := range files {
		if err := talk.send(struct{}{}, f); err != nil {
			return err
		}
	}
	for _, s := range sessions {
		nc := s.NetConn()
		n, ok := number[s.Export()]
		if !ok {
			return fmt.Errorf("a client of an export %q that is not offered", s.Agreement.Export)
		}
		if err := sendConn(talk, nc, heldClient{nc.LocalAddr().Network(), s.Agreement, n, s.Unread}); err != nil {
			return err
		}
	}
	for _, nc := range waiting {
		if err := sendConn(talk, nc, heldClient{Network: nc.LocalAddr().Network()}); err != nil {
			return err
		}
	}
	return nil
}

// sendConn sends what there is to know of a client, and a copy of its descriptor.
func sendConn(talk dialogue, nc net.Conn, client heldClient) error {
	f, err := fileOf(nc)
	if err != nil {
		return err
	}
	defer f.Close()
	return talk.send(client, f)
}
