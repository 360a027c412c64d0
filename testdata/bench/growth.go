package main

import (
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
)

var (
	growthConnections = []int{1, 2, 4, 8}
	growthDepths      = []int{1, 2, 4, 8, 16, 32, 64, 128}
)

// growth is random 4k reads over numbers of connections and queue depths.
func growth() []load {
	var loads []load
	for _, c := range growthConnections {
		for _, q := range growthDepths {
			loads = append(loads, load{name: growthName(c, q), connections: c, depth: q, block: 4 << 10, reads: 100})
		}
	}
	return loads
}

func growthName(connections, depth int) string {
	return fmt.Sprintf("rr4k-c%d-q%d", connections, depth)
}

// splitGrowth takes the results of the suite growth, which have a table of their own, out of all.
func splitGrowth(all []*result) (others, growing []*result) {
	names := make(map[string]bool)
	for _, l := range growth() {
		names["growth/"+l.name] = true
	}
	for _, r := range all {
		if names[r.Case] {
			growing = append(growing, r)
		} else {
			others = append(others, r)
		}
	}
	return others, growing
}

// printGrowth prints thousands of requests in a second, and the server's CPU time for each.
func printGrowth(out io.Writer, results []*result) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(w, "growth: 4k reads, k IOPS (CPU µs)\tconnections\t")
	for _, q := range growthDepths {
		fmt.Fprintf(w, "%d in flight\t", q)
	}
	fmt.Fprintln(w)
	for i, s := range results[0].Servers {
		for _, c := range growthConnections {
			fmt.Fprintf(w, "%s\t%d\t", s.Name, c)
			for _, q := range growthDepths {
				fmt.Fprint(w, growthCell(results, i, growthName(c, q)), "\t")
			}
			fmt.Fprintln(w)
		}
	}
	return w.Flush()
}

func growthCell(results []*result, server int, name string) string {
	k := slices.IndexFunc(results, func(r *result) bool { return r.Case == "growth/"+name })
	if k < 0 || len(results[k].Servers[server].Samples) == 0 {
		return "-"
	}
	s := results[k].Servers[server]
	return fmt.Sprintf("%.0f (%.1f)", metric(iops).of(s).Median/1000, metric(serverCPU).of(s).Median)
}
