package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"text/tabwriter"
)

// idleConnections is how many connections share what they cost.
const idleConnections = 256

// An idle says what connections cost that have been busy and wait for their client.
type idle struct {
	Server string `json:"server"`
	// KiB of anonymous memory of the server for each connection.
	KiB    float64 `json:"kib"`
	Failed string  `json:"failed,omitempty"`
}

// measureIdle measures one server after the other; they do not disturb each other.
func measureIdle(ctx context.Context, o options, w *workspace) ([]idle, error) {
	servers := []server{
		nbdctlMemory("nbdctl", ours),
		nbdkitMemory,
		nbdkitMemorySingle,
		qemuNBD(),
		nbdServer(),
		goNBD("memory"),
	}
	var all []idle
	for _, s := range servers {
		v := idle{Server: s.name}
		var err error
		if v.KiB, err = idleMemory(ctx, s, o, w); err != nil {
			v.Failed = err.Error()
			log.Printf("idle: %s: %v", s.name, err)
		}
		all = append(all, v)
	}
	return all, ctx.Err()
}

func idleMemory(ctx context.Context, s server, o options, w *workspace) (kib float64, err error) {
	room, remove, err := w.room()
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, remove()) }()
	c := client{w: w, cpu: -1, space: 64 << 20, warm: o.warm, timed: o.timed}
	at, err := placeFor(s, "unix", room, room, c.space)
	if err != nil {
		return 0, err
	}
	p, err := s.start(ctx, w, at, -1)
	if err != nil {
		return 0, err
	}
	defer p.stop()
	if err := c.fill(ctx, p); err != nil {
		return 0, err
	}
	before, err := anonymous(p.pid)
	if err != nil {
		return 0, err
	}
	after, err := c.withConnections(ctx, p)
	return (after - before) / idleConnections, err
}

// withConnections has all connections make requests, and returns what the server holds while they
// are still there.
func (c client) withConnections(ctx context.Context, p *process) (float64, error) {
	cmd := exec.CommandContext(ctx, c.w.path("loadgen"), "load", "-i", "-a", p.at.url(), "-n", p.export,
		"-c", strconv.Itoa(idleConnections), "-q", "4", "-r", "70", "-S", strconv.FormatInt(c.space, 10),
		"-w", seconds(c.warm), "-d", seconds(c.timed))
	cmd.Stderr = os.Stderr
	hold, err := cmd.StdinPipe()
	if err != nil {
		return 0, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	var held float64
	if _, err = bufio.NewReader(stdout).ReadString('\n'); err == nil {
		held, err = anonymous(p.pid)
	}
	return held, errors.Join(err, hold.Close(), cmd.Wait())
}

// anonymous is the memory, in KiB, of a process and its descendants, their share of what they
// share; without files.
func anonymous(pid int) (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, err
	}
	var sum float64
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "Pss_Anon:"); ok {
			if _, err := fmt.Sscanf(v, "%f kB", &sum); err != nil {
				return 0, err
			}
		}
	}
	for _, child := range children(pid) {
		if kib, err := anonymous(child); err == nil { // Else it has just ended.
			sum += kib
		}
	}
	return sum, nil
}

// children lists the child processes of all threads of a process. Threads that have just ended have
// none.
func children(pid int) []int {
	paths, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid)) // The pattern is a good one.
	var pids []int
	for _, path := range paths {
		b, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		for _, field := range strings.Fields(string(b)) {
			if n, err := strconv.Atoi(field); err == nil {
				pids = append(pids, n)
			}
		}
	}
	return pids
}

func printIdle(out io.Writer, all []idle) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "memory of an idle connection\tKiB")
	for _, v := range all {
		if v.Failed != "" {
			fmt.Fprintf(w, "%s\tno number: %s\n", v.Server, brief(v.Failed))
			continue
		}
		fmt.Fprintf(w, "%s\t%.0f\n", v.Server, v.KiB)
	}
	return w.Flush()
}
