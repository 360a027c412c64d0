package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"time"
)

// fioFlags have fio give a load to so many bytes of whatever it is.
func fioFlags(l load, size int64, timed time.Duration) []string {
	kind := "rand"
	if l.sequential {
		kind = ""
	}
	if l.writes() {
		kind += "write"
	} else {
		kind += "read"
	}
	return []string{
		"--output-format=json",
		"--name=" + l.name,
		"--thread",
		"--rw=" + kind,
		fmt.Sprintf("--bs=%d", l.block),
		fmt.Sprintf("--iodepth=%d", l.depth),
		fmt.Sprintf("--size=%d", size),
		"--norandommap",
		"--randrepeat=0",
		"--time_based",
		fmt.Sprintf("--runtime=%dms", timed.Milliseconds()),
		"--ramp_time=50ms",
	}
}

// A fioJob is what fio says of a load.
type fioJob struct {
	Error int `json:"error"`
	// Milliseconds is how long it took without the ramp. Of that the percentages are, which are the
	// CPU time of its thread.
	Milliseconds  float64 `json:"job_runtime"`
	UserPercent   float64 `json:"usr_cpu"`
	SystemPercent float64 `json:"sys_cpu"`
	Read, Write   fioDirection
}

// A fioDirection is what fio says of reads or of writes.
type fioDirection struct {
	Requests  float64 `json:"total_ios"`
	IOPS      float64 `json:"iops"`
	Bandwidth float64 `json:"bw_bytes"`
	Latency   struct {
		Percentile map[string]float64 `json:"percentile"` // in nanoseconds
	} `json:"clat_ns"`
}

// parseFio reads what fio has printed. An engine may have printed something before.
func parseFio(out []byte, l load) (sample, error) {
	var answer struct{ Jobs []fioJob }
	if err := json.Unmarshal(out[max(0, bytes.IndexByte(out, '{')):], &answer); err != nil {
		return sample{}, fmt.Errorf("fio: %w", err)
	}
	if len(answer.Jobs) != 1 || answer.Jobs[0].Error != 0 {
		return sample{}, fmt.Errorf("fio: %s: %s", l.name, out)
	}
	job := answer.Jobs[0]
	d := job.Read
	if l.writes() {
		d = job.Write
	}
	return sample{
		IOPS:     d.IOPS,
		MBps:     d.Bandwidth / 1e6,
		P50:      d.Latency.Percentile["50.000000"] / 1e3,
		P99:      d.Latency.Percentile["99.000000"] / 1e3,
		ClientUS: (job.UserPercent + job.SystemPercent) / 100 * job.Milliseconds * 1e3 / max(d.Requests, 1),
	}, nil
}
