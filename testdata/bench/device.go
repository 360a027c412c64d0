package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// deviceSize, in bytes, is the size of the devices in the lab.
const deviceSize = 64 << 20

// A device is a way to a /dev/nbdX.
type device struct {
	name string
	role role
	// attach returns its path, and what detaches it. It is node with those programs that have to be
	// told one.
	attach func(ctx context.Context, w *workspace, node string) (path string, detach func() error, err error)
}

func devices() []device {
	return []device{
		{"nbdctl", ours, attachNbdctl()},
		{"nbdctl --ioctl", peer, attachNbdctl("--ioctl")},
		{"qemu-nbd -c", peer, attachQEMU},
		{"nbd-client, nbdkit -t 1", peer, attachClient(nbdkitMemorySingle)},
		{"nbd-client, nbd-server", peer, attachClient(nbdServer())},
		{"nbd-client, floor", floor, attachClient(theFloor)},
	}
}

func attachNbdctl(flags ...string) func(context.Context, *workspace, string) (string, func() error, error) {
	return attachNbdctlBy(nil, flags)
}

// attachNbdctlBy has another program run nbdctl.
func attachNbdctlBy(by, flags []string) func(context.Context, *workspace, string) (string, func() error, error) {
	return func(ctx context.Context, w *workspace, _ string) (string, func() error, error) {
		nbdctl := w.path("nbdctl")
		connect := []string{nbdctl, "connect", "--size", fmt.Sprint(deviceSize), "memory"}
		out, err := output(ctx, slices.Concat(by, connect, flags)...)
		if err != nil {
			return "", nil, err
		}
		path := strings.TrimSpace(out)
		return path, func() error {
			return run(context.WithoutCancel(ctx), "/", nbdctl, "disconnect", path)
		}, nil
	}
}

func attachQEMU(ctx context.Context, w *workspace, node string) (string, func() error, error) {
	path, err := image(filepath.Join(w.shm, "qemu"), deviceSize)
	if err != nil {
		return "", nil, err
	}
	if err := run(ctx, "/", "qemu-nbd", "-c", node, "-f", "raw", path); err != nil {
		return "", nil, err
	}
	return node, func() error { return run(context.WithoutCancel(ctx), "/", "qemu-nbd", "-d", node) }, nil
}

// attachClient lets nbd-client connect the kernel with a server.
func attachClient(s server) func(context.Context, *workspace, string) (string, func() error, error) {
	return func(ctx context.Context, w *workspace, node string) (string, func() error, error) {
		room, remove, err := w.room()
		if err != nil {
			return "", nil, err
		}
		at, err := placeFor(s, "unix", room, room, deviceSize)
		if err != nil {
			return "", nil, errors.Join(err, remove())
		}
		p, err := s.start(ctx, w, at, -1)
		if err != nil {
			return "", nil, errors.Join(err, remove())
		}
		end := func() error {
			p.stop()
			return remove()
		}
		if err := run(ctx, "/", "nbd-client", "-unix", at.address, node, "-N", s.export); err != nil {
			return "", nil, errors.Join(err, end())
		}
		return node, func() error {
			return errors.Join(run(context.WithoutCancel(ctx), "/", "nbd-client", "-d", node), end())
		}, nil
	}
}

// awaitSize returns when the device has a size, or none. Some of the programs return earlier than
// that.
func awaitSize(ctx context.Context, path string, none bool) error {
	ctx, cancel := context.WithTimeout(ctx, startPatience)
	defer cancel()
	again := time.NewTicker(10 * time.Millisecond)
	defer again.Stop()
	attribute := filepath.Join("/sys/block", filepath.Base(path), "size")
	for {
		b, err := os.ReadFile(attribute)
		if err != nil {
			return err
		}
		if (strings.TrimSpace(string(b)) == "0") == none {
			return nil
		}
		select {
		case <-again.C:
		case <-ctx.Done():
			return fmt.Errorf("%s: size is %s sectors: %w", path, strings.TrimSpace(string(b)), ctx.Err())
		}
	}
}

// verifyDevice writes the device, past the page cache, and compares what it reads. It leaves no
// hole for the loads to read.
func verifyDevice(path string) (err error) {
	const block = 1 << 20
	fd, err := syscall.Open(path, syscall.O_RDWR|syscall.O_DIRECT|syscall.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, syscall.Close(fd)) }()
	// A mapping, since O_DIRECT wants it aligned.
	const prot, flags = syscall.PROT_READ | syscall.PROT_WRITE, syscall.MAP_PRIVATE | syscall.MAP_ANONYMOUS
	buf, err := syscall.Mmap(-1, 0, block, prot, flags)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, syscall.Munmap(buf)) }()
	expected := make([]byte, block)
	seed := [32]byte{byte(time.Now().UnixNano())} // What the last check wrote does not pass.
	written, read := rand.NewChaCha8(seed), rand.NewChaCha8(seed)
	for off := int64(0); off < deviceSize; off += block {
		_, _ = written.Read(buf) // It never fails.
		if n, err := syscall.Pwrite(fd, buf, off); err != nil || n != block {
			return fmt.Errorf("%s: write of 1 MiB at %d: %d bytes: %w", path, off, n, err)
		}
	}
	for off := int64(0); off < deviceSize; off += block {
		_, _ = read.Read(expected)
		if n, err := syscall.Pread(fd, buf, off); err != nil || n != block {
			return fmt.Errorf("%s: read of 1 MiB at %d: %d bytes: %w", path, off, n, err)
		}
		if !bytes.Equal(buf, expected) {
			return fmt.Errorf("%s: wrong data in the 1 MiB at %d", path, off)
		}
	}
	return nil
}
