package metrics_test

import (
	"fmt"
	"time"

	"github.com/nbdctl/nbdctl/server/metrics"
	"github.com/nbdctl/nbdctl/server/wire"
)

// What was served between two looks is the difference of what they have found.
func ExampleHistogram_Since() {
	var c metrics.Counters
	c.Count(wire.CmdRead, 4096, false, 3*time.Millisecond)
	before := c.Snapshot()
	for range 99 {
		c.Count(wire.CmdRead, 4096, false, 20*time.Microsecond)
	}
	c.Count(wire.CmdRead, 4096, false, 2*time.Millisecond)
	now := c.Snapshot()

	since := now.Read.Latency.Since(&before.Read.Latency)
	fmt.Println("requests:", since.Count())
	fmt.Println("median below 25 µs:", since.Quantile(0.5) < 25*time.Microsecond)
	fmt.Println("mean:", since.Mean())
	// Output:
	// requests: 100
	// median below 25 µs: true
	// mean: 39.8µs
}
