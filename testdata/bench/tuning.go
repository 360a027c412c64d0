package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
)

// tuningLoads show what settings of a device and of its sockets do: few and many requests in
// flight, short ones and such that the kernel splits.
func tuningLoads() []load {
	return []load{
		{name: "rr4k-q1", depth: 1, block: 4 << 10, reads: 100},
		{name: "rr4k-q32", depth: 32, block: 4 << 10, reads: 100},
		{name: "rw4k-q32", depth: 32, block: 4 << 10},
		{name: "rr128k-q32", depth: 32, block: 128 << 10, reads: 100},
		{name: "rw128k-q32", depth: 32, block: 128 << 10},
		{name: "rr4m-q4", depth: 4, block: 4 << 20, reads: 100},
		{name: "rw4m-q4", depth: 4, block: 4 << 20},
	}
}

// sendBuffers has the size in bytes that new sockets have for what they send, and sendBuffersMost
// what they may ask for. For the end that the kernel gets, nbdctl asks for 1 MiB, and without the
// right to do so leaves it as it is.
const (
	sendBuffers     = "/proc/sys/net/core/wmem_default"
	sendBuffersMost = "/proc/sys/net/core/wmem_max"
)

// tunings are nbdctl's device with its default settings, and others with one of them changed.
func tunings() []device {
	return []device{
		{"nbdctl", ours, attachTuned("", "")},
		{"max_sectors_kb 128", peer, attachTuned("queue/max_sectors_kb", "128")},
		{"max_sectors_kb 512", peer, attachTuned("queue/max_sectors_kb", "512")},
		{"max_sectors_kb 4096", peer, attachTuned("queue/max_sectors_kb", "4096")},
		{"scheduler none", peer, attachTuned("queue/scheduler", "none")},
		{"nr_requests 32", peer, attachTuned("queue/nr_requests", "32")},
		{"nr_requests 128", peer, attachTuned("queue/nr_requests", "128")},
		{"SO_SNDBUF 64 KiB", peer, attachNarrow("65536")},
		{"SO_SNDBUF 208 KiB", peer, attachNarrow("212992")},
		{"SO_SNDBUF 8 MiB", peer, attachNarrow("8388608")},
	}
}

// attachTuned makes a setting of the device.
func attachTuned(setting, value string) func(context.Context, *workspace, string) (string, func() error, error) {
	return func(ctx context.Context, w *workspace, node string) (string, func() error, error) {
		path, detach, err := attachNbdctl()(ctx, w, node)
		if err != nil || setting == "" {
			return path, detach, err
		}
		file := filepath.Join("/sys/block", filepath.Base(path), setting)
		if err := os.WriteFile(file, []byte(value), 0o644); err != nil {
			return "", nil, errors.Join(err, detach())
		}
		return path, detach, nil
	}
}

// attachNarrow has the machine give sockets that send buffer while the device is made, by an nbdctl
// that may not ask for more.
func attachNarrow(value string) func(context.Context, *workspace, string) (string, func() error, error) {
	return func(ctx context.Context, w *workspace, node string) (string, func() error, error) {
		before, err := os.ReadFile(sendBuffers)
		if err != nil {
			return "", nil, err
		}
		// The server's end is to be as ever.
		err = errors.Join(
			os.WriteFile(sendBuffersMost, []byte("1048576"), 0o644),
			os.WriteFile(sendBuffers, []byte(value), 0o644),
		)
		if err != nil {
			return "", nil, err
		}
		path, detach, err := attachNbdctlBy([]string{"setpriv", "--bounding-set=-net_admin"}, nil)(ctx, w, node)
		return path, detach, errors.Join(err, os.WriteFile(sendBuffers, before, 0o644))
	}
}
