package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
)

// A report is all that a run has found.
type report struct {
	Machine machine   `json:"machine"`
	Quick   bool      `json:"quick"`
	Rounds  int       `json:"rounds"`
	Seconds float64   `json:"seconds"`
	Results []*result `json:"results"`
	Idle    []idle    `json:"idle,omitempty"`
	Goals   []outcome `json:"goals"`
}

// A machine is what the numbers were taken on.
type machine struct {
	CPU        string `json:"cpu"`
	Processors int    `json:"processors"`
	Kernel     string `json:"kernel"`
	Go         string `json:"go"`
}

func thisMachine() machine {
	m := machine{CPU: "unknown", Processors: runtime.NumCPU(), Kernel: "unknown", Go: runtime.Version()}
	if b, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		m.Kernel = strings.TrimSpace(string(b))
	}
	b, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return m
	}
	for line := range strings.Lines(string(b)) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
			m.CPU = strings.TrimSpace(value)
			break
		}
	}
	return m
}

func (r *report) print(out io.Writer) error {
	m := r.Machine
	fmt.Fprintf(out, "%d × %s, Linux %s, %s; %d rounds; %.0f s\n\n",
		m.Processors, m.CPU, m.Kernel, m.Go, r.Rounds, r.Seconds)
	others, growing := splitGrowth(r.Results)
	others, clients := splitClients(others)
	if len(others) > 0 {
		if err := printTable(out, others); err != nil {
			return err
		}
	}
	if len(growing) > 0 {
		fmt.Fprintln(out)
		if err := printGrowth(out, growing); err != nil {
			return err
		}
	}
	if len(clients) > 0 {
		fmt.Fprintln(out)
		if err := printClients(out, clients); err != nil {
			return err
		}
	}
	if len(r.Idle) > 0 {
		fmt.Fprintln(out)
		if err := printIdle(out, r.Idle); err != nil {
			return err
		}
	}
	fmt.Fprintf(out, "\ngoals (medians of the ratios of each round [min–max]; "+
		"where by CPU time is another, others were at work)\n%s", goalsTable(r.Goals))
	fmt.Fprintf(out, "\nothers kept %.2f of the processors busy meanwhile (mean); on a quiet machine it is none\n",
		r.disturbance())
	if r.Quick {
		fmt.Fprintln(out, "quick: these numbers are for nothing but to see that it works")
	}
	return nil
}

// disturbance is the mean over all samples of what others took.
func (r *report) disturbance() float64 {
	var sum, n float64
	for _, c := range r.Results {
		for _, s := range c.Servers {
			for _, v := range s.Samples {
				sum += v.Others
				n++
			}
		}
	}
	return sum / max(n, 1)
}

func (r *report) writeJSON(path string) error {
	b, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(b, '\n'), 0o644)
}

// failure is an error if anything of ours answered wrongly. That peers do is a result.
func (r *report) failure() error {
	for _, c := range r.Results {
		for _, s := range c.Servers {
			if s.Role != peer && s.Failed != "" {
				return fmt.Errorf("%s: %s: %s", c.Case, s.Name, s.Failed)
			}
		}
	}
	return nil
}
