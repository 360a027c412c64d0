package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
)

// tuningLoads show what settings of a device and of its sockets do: few and many requests in flight, short ones and such that
// the kernel splits.
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

// sendBuffers has the size in bytes that new sockets have for what they send; nbdctl leaves it so for the end that the kernel gets,
// unless the kernel is one that loses connections.
const sendBuffers = "/proc/sys/net/core/wmem_default"

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
		{"SO_SNDBUF 64 KiB", peer, attachTuned(sendBuffers, "65536")},
		{"SO_SNDBUF 1 MiB", peer, attachTuned(sendBuffers, "1048576")},
		{"SO_SNDBUF 8 MiB", peer, attachTuned(sendBuffers, "8388608")},
	}
}

// attachTuned makes a setting: of the device, or of the machine for as long as the device is made.
func attachTuned(setting, value string) func(context.Context, *workspace, string) (string, func() error, error) {
	return func(ctx context.Context, w *workspace, node string) (string, func() error, error) {
		if filepath.IsAbs(setting) {
			before, err := os.ReadFile(setting)
			if err != nil {
				return "", nil, err
			}
			if err := os.WriteFile(setting, []byte(value), 0o644); err != nil {
				return "", nil, err
			}
			path, detach, err := attachNbdctl()(ctx, w, node)
			return path, detach, errors.Join(err, os.WriteFile(setting, before, 0o644))
		}
		path, detach, err := attachNbdctl()(ctx, w, node)
		if err != nil || setting == "" {
			return path, detach, err
		}
		if err := os.WriteFile(filepath.Join("/sys/block", filepath.Base(path), setting), []byte(value), 0o644); err != nil {
			return "", nil, errors.Join(err, detach())
		}
		return path, detach, nil
	}
}
