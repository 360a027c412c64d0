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
	servers := []server{nbdctlMemory("nbdctl", ours), nbdkitMemory, nbdkitMemorySingle, qemuNBD(), nbdServer(), goNBD("memory")}
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

func idleMemory(ctx context.Context, s server, o options, w *workspace) (float64, error) {
	at, err := w.placeFor(s, "unix", w.shm)
	if err != nil {
		return 0, err
	}
	p, err := s.start(ctx, w, at, -1)
	if err != nil {
		return 0, err
	}
	defer p.stop()
	c := client{w: w, cpu: -1, space: 64 << 20, warm: o.warm, timed: o.timed}
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

// withConnections has all connections make requests, and returns what the server holds while they are still there.
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

// anonymous is the memory, in KiB, of a process and its descendants, their share of what they share; without files.
func anonymous(pid int) (float64, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var kib float64
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if v, ok := strings.CutPrefix(lines.Text(), "Pss_Anon:"); ok {
			if _, err := fmt.Sscanf(v, "%f kB", &kib); err != nil {
				return 0, err
			}
		}
	}
	children, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		return 0, err
	}
	for _, path := range children {
		b, err := os.ReadFile(path)
		if err != nil {
			return 0, err
		}
		for _, child := range strings.Fields(string(b)) {
			n, err := strconv.Atoi(child)
			if err != nil {
				return 0, err
			}
			more, err := anonymous(n)
			if err != nil {
				return 0, err
			}
			kib += more
		}
	}
	return kib, nil
}

func printIdle(out io.Writer, all []idle) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "memory of an idle connection\tKiB")
	for _, v := range all {
		if v.Failed != "" {
			fmt.Fprintf(w, "%s\tno number: %s\n", v.Server, firstLine(v.Failed))
			continue
		}
		fmt.Fprintf(w, "%s\t%.0f\n", v.Server, v.KiB)
	}
	return w.Flush()
}
