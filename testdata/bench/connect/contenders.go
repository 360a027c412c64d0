package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/nbdctl/nbdctl/backends/memory"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/server"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

const (
	deviceSize = 64 << 20
	most       = 64 // devices at once

	// Each has indexes of its own, so that nobody finds settings of another.
	bareIndex, clientIndex, qemuIndex = 200, 300, 400
)

// contenders makes all of them, the one that others are compared with first.
func contenders(ctx context.Context) ([]contender, func(), error) {
	dir, err := os.MkdirTemp("", "connect")
	if err != nil {
		return nil, nil, err
	}
	client, err := nbdnl.New()
	if err != nil {
		return nil, nil, err
	}
	b, err := newBare()
	if err != nil {
		return nil, nil, err
	}
	pool, err := blockdev.NewPool(blockdev.PoolOptions{Name: "bench", Client: client, Warm: most, Max: most})
	if err != nil {
		return nil, nil, err
	}
	if err := pool.Fill(ctx); err != nil {
		return nil, nil, err
	}
	for i := range most {
		for _, index := range []int{bareIndex + i, clientIndex + i, qemuIndex + i} {
			if err := client.AddIndex(ctx, index); err != nil {
				return nil, nil, err
			}
		}
	}
	socket := filepath.Join(dir, "socket")
	l, err := net.Listen("unix", socket)
	if err != nil {
		return nil, nil, err
	}
	m, err := memory.New(deviceSize, memory.Options{})
	if err != nil {
		return nil, nil, err
	}
	e, err := server.NewExport(m, server.Options{BlockSize: 512})
	if err != nil {
		return nil, nil, err
	}
	s := &server.Server{Exports: map[string]*server.Export{"": e}}
	go s.Serve(l)
	all := []contender{
		b,
		&pooled{pool, "nbdctl unopened", true},
		&pooled{pool, "nbdctl", false},
		nbdClient{socket},
		qemuNBD{dir},
	}
	return all, func() {
		// An error would be nobody's: the machine is at its end.
		_ = errors.Join(s.Close(), m.Close(), pool.Close(), client.Close(), os.RemoveAll(dir))
	}, nil
}

// pooled is nbdctl's pool, as a program uses it.
type pooled struct {
	pool     *blockdev.Pool
	title    string
	unopened bool
}

func (p *pooled) name() string       { return p.title }
func (p *pooled) able(int, int) bool { return true }

func (p *pooled) connect(ctx context.Context, _, connections int) (func() error, time.Duration, error) {
	m, err := memory.New(deviceSize, memory.Options{})
	if err != nil {
		return nil, 0, err
	}
	began := time.Now()
	d, err := p.pool.Connect(ctx, m, blockdev.Options{Connections: connections, Unopened: p.unopened})
	took := time.Since(began)
	if err != nil {
		return nil, 0, errors.Join(err, m.Close())
	}
	return func() error { return errors.Join(d.Close(), m.Close()) }, took, nil
}

// nbdClient is nbd-client, with a server in this process.
type nbdClient struct{ socket string }

func (nbdClient) name() string              { return "nbd-client" }
func (nbdClient) able(_, parallel int) bool { return parallel <= 16 }
func (c nbdClient) connect(ctx context.Context, i, connections int) (func() error, time.Duration, error) {
	node := nbdnl.Path(clientIndex + i)
	began := time.Now()
	err := command(ctx, "nbd-client", "-unix", c.socket, node, "-C", strconv.Itoa(connections), "-b", "512")
	if err == nil {
		err = awaitSize(ctx, node, true)
	}
	return func() error {
		return errors.Join(command(ctx, "nbd-client", "-d", node), awaitSize(ctx, node, false))
	}, time.Since(began), err
}

// qemuNBD is qemu-nbd, which has one connection.
type qemuNBD struct{ dir string }

func (qemuNBD) name() string                        { return "qemu-nbd" }
func (qemuNBD) able(connections, parallel int) bool { return connections == 1 && parallel <= 16 }
func (q qemuNBD) connect(ctx context.Context, i, _ int) (func() error, time.Duration, error) {
	node, image := nbdnl.Path(qemuIndex+i), filepath.Join(q.dir, fmt.Sprint("image", i))
	f, err := os.Create(image)
	if err == nil {
		err = errors.Join(f.Truncate(deviceSize), f.Close())
	}
	if err != nil {
		return nil, 0, err
	}
	began := time.Now()
	if err = command(ctx, "qemu-nbd", "-c", node, "-f", "raw", image); err == nil {
		err = awaitSize(ctx, node, true)
	}
	return func() error {
		return errors.Join(command(ctx, "qemu-nbd", "-d", node), awaitSize(ctx, node, false))
	}, time.Since(began), err
}

func command(ctx context.Context, argv ...string) error {
	if out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), err, out)
	}
	return nil
}

// awaitSize waits until a device has a size, or none: the programs return earlier than that.
func awaitSize(ctx context.Context, node string, some bool) error {
	look := time.NewTicker(time.Millisecond)
	defer look.Stop()
	for {
		b, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(node), "size"))
		if err != nil || (strings.TrimSpace(string(b)) != "0") == some {
			return err
		}
		select {
		case <-look.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
