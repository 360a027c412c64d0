package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
)

// splitClients takes the results of clients, which have a table of their own, out of all.
func splitClients(all []*result) (others, clients []*result) {
	for _, r := range all {
		if strings.HasPrefix(r.Case, "client/") {
			clients = append(clients, r)
		} else {
			others = append(others, r)
		}
	}
	return others, clients
}

// printClients prints a line for each client of each case. CPU times are for a request; of a copy
// that is what is read, and perhaps written, at once.
func printClients(out io.Writer, results []*result) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "case\tclient of nbdctl\tmedian\tmin–max\tours/it\tmin–max\t"+
		"its CPU µs\tours/it\tmin–max\tserver µs\tp50 µs\tp99 µs\tallocations")
	for _, r := range results {
		for _, s := range r.Servers {
			if len(s.Samples) == 0 {
				fmt.Fprintf(w, "%s\t%s\tno number: %s\n", r.Case, s.Name, brief(s.Failed))
				continue
			}
			fmt.Fprintln(w, clientRow(r, s))
		}
	}
	return w.Flush()
}

func clientRow(r *result, s *serverResult) string {
	rate, unit := r.rate()
	all := rate.of(s)
	usual := func(m metric) float64 { return m.of(s).Median }
	lead, hasLead := metric(iops).ratio(r.first(ours), s)
	cost, _ := metric(clientCPU).ratio(r.first(ours), s)
	allocations := "-"
	if s.Role == ours || s.Role == variant {
		allocations = fmt.Sprintf("%.4f", usual(allocated))
	}
	known := func(m metric) string {
		if usual(m) == 0 {
			return "-"
		}
		return fmt.Sprintf("%.1f", usual(m))
	}
	return strings.Join([]string{
		r.Case, s.Name, short(all.Median) + unit, short(all.Low) + "–" + short(all.High),
		number(lead.Median, hasLead), number(lead.Low, hasLead) + "–" + number(lead.High, hasLead),
		fmt.Sprintf("%.2f", usual(clientCPU)), number(cost.Median, hasLead),
		number(cost.Low, hasLead) + "–" + number(cost.High, hasLead), known(serverCPU),
		known(func(v sample) float64 { return v.P50 }), known(func(v sample) float64 { return v.P99 }), allocations,
	}, "\t")
}
