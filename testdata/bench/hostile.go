package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
)

// hostileLoad is what the honest client does.
var hostileLoad = rr4k

const hostileCase = "hostile/rr4k-q32"

// measureHostile measures what is left to an honest client, which shares its processor with the
// server, while attackers have another processor for themselves. They come from an address of their
// own, as strangers do.
func measureHostile(ctx context.Context, o options, w *workspace) (_ []*result, err error) {
	room, remove, err := w.room()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, remove()) }()
	s := nbdctlMemory("attacked", ours)
	plain := s.command
	s.command = func(w *workspace, at place) ([]string, error) {
		argv, err := plain(w, at)
		return append(argv, "--tls", "allow", "--tls-certificates", w.path("certificates")), err
	}
	at, err := placeFor(s, "tcp", room, room, o.space)
	if err != nil {
		return nil, err
	}
	p, err := s.start(ctx, w, at, o.cpu)
	if err != nil {
		return nil, err
	}
	defer p.stop()
	c := client{w: w, cpu: o.cpu, space: o.space, warm: 2 * o.warm, timed: 4 * o.timed}
	if err := c.verify(ctx, p); err != nil {
		return nil, err
	}
	quiet := &serverResult{Name: "quiet", Role: floor}
	attacked := &serverResult{Name: s.name, Role: s.role}
	for range o.rounds {
		if err := c.rounds(ctx, p, quiet, attacked); err != nil {
			attacked.Failed = err.Error()
			break
		}
	}
	if err := c.verify(ctx, p); err != nil {
		attacked.Failed = err.Error()
	}
	peak, err := peakMemory(p.pid)
	log.Printf("%-26s the server's memory was at most %d MiB", hostileCase, peak>>10)
	servers := []*serverResult{quiet, attacked}
	return []*result{{Case: hostileCase, Servers: servers, block: hostileLoad.block}}, err
}

// rounds takes a sample in peace, and one under attack.
func (c client) rounds(ctx context.Context, p *process, quiet, attacked *serverResult) error {
	s, err := c.runOnce(ctx, p, hostileLoad)
	if err != nil {
		return err
	}
	quiet.Samples = append(quiet.Samples, s)
	stop, err := attack(ctx, c.w, p, 1-c.cpu)
	if err != nil {
		return err
	}
	s, err = c.runOnce(ctx, p, hostileLoad)
	if err := errors.Join(err, stop()); err != nil {
		return err
	}
	attacked.Samples = append(attacked.Samples, s)
	return nil
}

// attack starts the attackers, and returns when all of them are at it.
func attack(ctx context.Context, w *workspace, p *process, cpu int) (stop func() error, err error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	argv := pin([]string{self, "-attack", p.at.address}, cpu)
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	said := new(strings.Builder)
	cmd.Stderr = said
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	var line [1]byte
	if _, err := stdout.Read(line[:]); err != nil {
		return nil, fmt.Errorf("attackers: %w: %s", errors.Join(err, cmd.Wait()), said)
	}
	return func() error {
		err := errors.Join(stdin.Close(), cmd.Wait())
		if text := strings.TrimSpace(said.String()); text != "" {
			log.Print(text)
		}
		return err
	}, nil
}

// peakMemory is the most memory, in KiB, that a process has ever had.
func peakMemory(pid int) (int, error) {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "status"))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			return strconv.Atoi(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(v), "kB")))
		}
	}
	return 0, fmt.Errorf("process %d: no VmHWM", pid)
}
