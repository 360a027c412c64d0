package main

import (
	"context"
	"errors"
	"net"
	"slices"
	"strings"
)

// remoteDevices are ways to make a device of another server's export, each with a server of the
// same kind of its own, over TCP.
func remoteDevices() []device {
	s := nbdkitMemorySingle
	return []device{
		{"nbdctl direct", ours, attachFar(s, nbdctlFar("way=direct"))},
		{"nbdctl relay", variant, attachFar(s, nbdctlFar("way=relay"))},
		{"nbd-client", peer, attachFar(s, clientFar)},
		{"qemu-nbd -c", peer, attachFar(s, qemuFar)},
	}
}

// remoteLoads are those of other devices, but for long requests one at a time, which tell nothing
// that the others do not.
func remoteLoads() []load {
	return slices.DeleteFunc(deviceLoads(), func(l load) bool { return l.block > 4<<10 && l.depth == 1 })
}

// A far is how a program makes a device of the export of a server at an address. It returns the
// path of the device, and the command that detaches it.
type far func(ctx context.Context, w *workspace, address, node string) (path string, detach []string, err error)

// attachFar starts a server, and makes a device of its export.
func attachFar(s server, attach far) func(context.Context, *workspace, string) (string, func() error, error) {
	return func(ctx context.Context, w *workspace, node string) (string, func() error, error) {
		room, remove, err := w.room()
		if err != nil {
			return "", nil, err
		}
		at, err := placeFor(s, "tcp", room, room, deviceSize)
		if err != nil {
			return "", nil, errors.Join(err, remove())
		}
		p, err := s.start(ctx, w, at, -1)
		if err != nil {
			return "", nil, errors.Join(err, remove())
		}
		path, detach, err := attach(ctx, w, at.address, node)
		if err != nil {
			p.stop()
			return "", nil, errors.Join(err, remove())
		}
		return path, func() error {
			err := run(context.WithoutCancel(ctx), "/", detach...)
			p.stop()
			return errors.Join(err, remove())
		}, nil
	}
}

func nbdctlFar(way string) far {
	return func(ctx context.Context, w *workspace, address, _ string) (string, []string, error) {
		nbdctl := w.path("nbdctl")
		out, err := output(ctx, nbdctl, "connect", "-o", way, "nbd://"+address)
		path := strings.TrimSpace(out)
		return path, []string{nbdctl, "disconnect", path}, err
	}
}

func clientFar(ctx context.Context, _ *workspace, address, node string) (string, []string, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return "", nil, err
	}
	err = run(ctx, "/", "nbd-client", host, port, node, "-N", "")
	return node, []string{"nbd-client", "-d", node}, err
}

func qemuFar(ctx context.Context, _ *workspace, address, node string) (string, []string, error) {
	err := run(ctx, "/", "qemu-nbd", "-c", node, "-f", "raw", "nbd://"+address)
	return node, []string{"qemu-nbd", "-d", node}, err
}
