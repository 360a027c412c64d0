package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// measureInside attaches one kind of device after the other, gives each the loads, and starts again; results go to out
// as JSON.
func measureInside(ctx context.Context, o options, out io.Writer) error {
	s := suite{name: "kernel", loads: deviceLoads()}.selected(o.wanted)
	w := &workspace{dir: o.out, shm: "/dev/shm"}
	var results []*result
	for _, l := range s.loads {
		r := &result{Case: s.caseName(l)}
		for _, d := range devices() {
			r.Servers = append(r.Servers, &serverResult{Name: d.name, Role: d.role})
		}
		results = append(results, r)
	}
	failed := make([]error, len(devices()))
	for round := range o.rounds {
		for k := range devices() {
			i := (round + k) % len(devices())
			if failed[i] != nil {
				continue
			}
			samples, err := devices()[i].measure(ctx, o, w, s.loads)
			if err != nil {
				log.Printf("kernel: %s fails: %v", devices()[i].name, err)
				failed[i] = err
			}
			for j, v := range samples {
				results[j].Servers[i].Samples = append(results[j].Servers[i].Samples, v)
			}
		}
	}
	(&contest{failed: failed, results: results}).disqualify()
	return errors.Join(ctx.Err(), json.NewEncoder(out).Encode(results))
}

// measure attaches the device, checks it, loads it, checks it again and detaches it.
func (d device) measure(ctx context.Context, o options, w *workspace, loads []load) (_ []sample, err error) {
	path, detach, err := d.attach(ctx, w)
	if err != nil {
		return nil, err
	}
	defer func() {
		err = errors.Join(err, detach(), awaitSize(context.WithoutCancel(ctx), path, true))
	}()
	if err := awaitSize(ctx, path, false); err != nil {
		return nil, err
	}
	if err := verifyDevice(path, 0x55); err != nil {
		return nil, err
	}
	samples, err := fio(ctx, path, loads, o.fio)
	if err != nil {
		return nil, err
	}
	return samples, verifyDevice(path, 0xaa)
}

// fio runs the loads one after the other.
func fio(ctx context.Context, path string, loads []load, timed time.Duration) ([]sample, error) {
	job := filepath.Join(os.TempDir(), "bench.fio")
	if err := os.WriteFile(job, []byte(fioJob(path, loads, timed)), 0o644); err != nil {
		return nil, err
	}
	out, err := output(ctx, "fio", "--output-format=json", job)
	if err != nil {
		return nil, err
	}
	var answer struct {
		Jobs []struct {
			Name        string `json:"jobname"`
			Error       int    `json:"error"`
			Read, Write fioDirection
		} `json:"jobs"`
	}
	if err := json.Unmarshal([]byte(out), &answer); err != nil {
		return nil, fmt.Errorf("fio: %w", err)
	}
	if len(answer.Jobs) != len(loads) {
		return nil, fmt.Errorf("fio: %d of %d jobs", len(answer.Jobs), len(loads))
	}
	var samples []sample
	for i, j := range answer.Jobs {
		if j.Error != 0 {
			return nil, fmt.Errorf("fio: %s: error %d", j.Name, j.Error)
		}
		d := j.Read
		if loads[i].writes() {
			d = j.Write
		}
		samples = append(samples, d.sample())
	}
	return samples, nil
}

func fioJob(path string, loads []load, timed time.Duration) string {
	var b strings.Builder
	fmt.Fprintf(&b, "[global]\nfilename=%s\nioengine=libaio\ndirect=1\nsize=%d\ntime_based\nruntime=%dms\nramp_time=100ms\nrandrepeat=0\nnorandommap\nthread\n",
		path, deviceSize, timed.Milliseconds())
	for _, l := range loads {
		kind := "randread"
		if l.writes() {
			kind = "randwrite"
		}
		fmt.Fprintf(&b, "[%s]\nstonewall\nrw=%s\nbs=%d\niodepth=%d\n", l.name, kind, l.block, l.depth)
	}
	return b.String()
}

// A fioDirection is what fio says of reads or of writes.
type fioDirection struct {
	IOPS      float64 `json:"iops"`
	Bandwidth float64 `json:"bw_bytes"`
	Latency   struct {
		Percentile map[string]float64 `json:"percentile"` // in nanoseconds
	} `json:"clat_ns"`
}

func (d fioDirection) sample() sample {
	return sample{
		IOPS: d.IOPS,
		MBps: d.Bandwidth / 1e6,
		P50:  d.Latency.Percentile["50.000000"] / 1e3,
		P99:  d.Latency.Percentile["99.000000"] / 1e3,
	}
}

// output runs a command and returns what it prints.
func output(ctx context.Context, argv ...string) (string, error) {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	var said strings.Builder
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s: %w: %s%s", argv[0], err, said.String(), out)
	}
	return string(out), nil
}
