package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/server"
)

// succeed is begin for a process that serves in the place of another one, from which it has all.
// With an error that one goes on as if nothing had been: nothing is closed that would take anything
// along, and this one is to end.
func (d *daemon) succeed(ctx context.Context) error {
	talk := dialogue{d.before.Conn}
	err := d.takeOver(ctx, talk)
	if err != nil {
		_ = talk.say(ctx, word{Error: err.Error()}) // Perhaps it has said so itself, or has gone.
		return fmt.Errorf("not taken over: %w", err)
	}
	return talk.c.Close()
}

func (d *daemon) takeOver(ctx context.Context, talk dialogue) error {
	if err := d.makeServer(); err != nil {
		return err
	}
	if err := talk.say(ctx, word{Hello: successionForm}); err != nil {
		return err
	}
	var l legacy
	if err := talk.receive(ctx, &l); err != nil {
		return err
	}
	if len(l.Descriptors) != len(l.Exports) {
		return fmt.Errorf("%d exports, and descriptors of %d", len(l.Exports), len(l.Descriptors))
	}
	control, err := d.receiveListeners(ctx, talk, &l)
	if err != nil {
		return err
	}
	for i, e := range l.Exports {
		for range l.Descriptors[i] {
			f, err := talk.descriptor(ctx, new(struct{}))
			if err != nil {
				return err
			}
			e.Files = append(e.Files, f)
		}
	}
	if err := d.set.Inherit(ctx, l.Offer, l.Exports); err != nil {
		return err
	}
	sessions, err := d.receiveClients(ctx, talk, &l)
	if err != nil {
		return err
	}
	var waiting []net.Conn
	for range l.Waiting {
		nc, _, err := talk.client(ctx)
		if err != nil {
			return err
		}
		waiting = append(waiting, nc)
	}
	if err := talk.say(ctx, word{Ready: true}); err != nil {
		return err
	}
	// It ends in one of go, an error, and the end of the other process, however long that takes.
	if err := talk.expect(ctx, func(w word) bool { return w.Go }); err != nil {
		return err
	}
	d.set.Begin()
	for _, s := range sessions {
		go func() { _ = d.server.ServeSession(s) }() // It is logged.
	}
	for _, nc := range waiting {
		go d.meet(nc)
	}
	if control != nil {
		d.control = host.ControlExports(control, d.status, d.handOver)
	}
	d.logger.Info("taken over", slog.Int("pid", os.Getpid()), slog.Int("clients", len(sessions)))
	if err := errors.Join(d.before.Served(), talk.say(ctx, word{Serving: true})); err != nil {
		d.logger.Warn("the process before does not know", slog.Any("reason", err))
	}
	return nil
}

// descriptor receives an object that comes with one.
func (d dialogue) descriptor(ctx context.Context, object any) (*os.File, error) {
	f, err := d.receiveFile(ctx, object)
	if err == nil && f == nil {
		err = errors.New("a descriptor has not come along: this process may have no more")
	}
	return f, err
}

// receiveListeners receives the sockets, of which that for control is the last.
func (d *daemon) receiveListeners(
	ctx context.Context, talk dialogue, l *legacy) (control net.Listener, err error) {
	for _, held := range l.Listeners {
		f, err := talk.descriptor(ctx, new(struct{}))
		if err != nil {
			return nil, err
		}
		listener, err := held.listener(f)
		if err != nil {
			return nil, err
		}
		d.listeners = append(d.listeners, listener)
	}
	if last := len(d.listeners) - 1; l.Control && last >= 0 {
		control, d.listeners = d.listeners[last], d.listeners[:last]
	}
	return control, nil
}

// receiveClients receives the clients. They are not served yet.
func (d *daemon) receiveClients(
	ctx context.Context, talk dialogue, l *legacy) (sessions []*server.Session, err error) {
	defer func() { d.server.Lookup = d.set.Lookup }()
	for range l.Clients {
		nc, held, err := talk.client(ctx)
		if err != nil {
			return nil, err
		}
		if held.Export < 0 || held.Export >= len(l.Exports) {
			return nil, errors.Join(fmt.Errorf("a client of export %d", held.Export), nc.Close())
		}
		d.server.Lookup = d.set.LookupOf(held.Export)
		s, err := d.server.Resume(nc, held.Agreement, held.Unread)
		if err != nil {
			return nil, errors.Join(err, nc.Close())
		}
		sessions = append(sessions, s)
	}
	return sessions, nil
}

// client receives a client.
func (d dialogue) client(ctx context.Context) (net.Conn, heldClient, error) {
	var held heldClient
	f, err := d.descriptor(ctx, &held)
	if err != nil {
		return nil, held, err
	}
	nc, err := held.conn(f)
	return nc, held, err
}

// meet serves a client that has said nothing yet.
func (d *daemon) meet(nc net.Conn) {
	s, err := d.server.Handshake(nc)
	if err != nil {
		nc.Close()
		return
	}
	_ = d.server.ServeSession(s) // It is logged.
}
