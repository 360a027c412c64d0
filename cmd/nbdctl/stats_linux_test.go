package main

import (
	"encoding/json"
	"strings"
	"testing"
)

// TestKernelStats shows that what is counted is what was done, in all and
// between two looks.
func TestKernelStats(t *testing.T) {
	requireKernel(t)
	dev := connected(t, "memory", "--size", "64M")
	sh(t, "dd if=/dev/zero of="+dev+" bs=64k count=100 oflag=direct status=none; blkdiscard "+dev)
	var v statsView
	if err := json.Unmarshal([]byte(must(t, "stats", dev, "--json")), &v); err != nil {
		t.Fatal(err)
	}
	w := v.Total.Write
	if w.Requests != 100 || w.Bytes != 100*64<<10 || w.Errors != 0 || v.Total.Trim.Requests == 0 {
		t.Errorf("100 writes and a trim are counted as %+v, %+v", w, v.Total.Trim)
	}
	if w.P50NS <= 0 || w.P50NS > w.P99NS || w.P99NS > w.MaxNS || w.MeanNS <= 0 {
		t.Errorf("times: %+v", w)
	}
	if v.Seconds != nil || v.Total.InFlight != 0 || v.Total.OldestNS != 0 {
		t.Errorf("stats: %+v", v)
	}
	if len(v.Connections) != 1 || v.Connections[0] != v.Total {
		t.Errorf("stats: %+v", v)
	}
	if out := must(t, "stats", dev); !containsAll(out, "write", "P99") || strings.Contains(out, "flush") {
		t.Errorf("stats prints\n%s", out)
	}

	watch := nbdctlCommand(t, "stats", dev, "--watch", "--json")
	var lines lockedBuffer
	watch.Stdout = &lines
	if err := watch.Start(); err != nil {
		t.Fatal(err)
	}
	lines.await(t, "\n")
	sh(t, "dd if="+dev+" of=/dev/null bs=64k count=50 iflag=direct status=none")
	var reads uint64
	eventually(t, func() bool {
		reads = 0
		for line := range strings.Lines(lines.String()) {
			var v statsView
			if err := json.Unmarshal([]byte(line), &v); err != nil {
				return false // not all of it yet
			}
			if v.Seconds == nil || v.Total.Write.Requests != 0 {
				t.Fatalf("the line is %s", line)
			}
			reads += v.Total.Read.Requests
		}
		return reads >= 50
	}, "50 reads")
	interrupt(t, watch)
	if err := watch.Wait(); err != nil || reads != 50 {
		t.Errorf("%d reads, %v", reads, err)
	}
	must(t, "disconnect", dev)
}
