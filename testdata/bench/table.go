package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
)

// printTable prints a line for each server of each case.
func printTable(out io.Writer, results []*result) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "case\tserver\tmedian\tmin–max\tof floor\tnbdctl/it\tmin–max\t"+
		"CPU µs\tof floor\tp50 µs\tp99 µs")
	for _, r := range results {
		for _, s := range r.Servers {
			if len(s.Samples) == 0 {
				fmt.Fprintf(w, "%s\t%s\tno number: %s\n", r.Case, s.Name, brief(s.Failed))
				continue
			}
			fmt.Fprintln(w, row(r, s))
		}
	}
	return w.Flush()
}

func row(r *result, s *serverResult) string {
	rate, unit := r.rate()
	all := rate.of(s)
	usual := func(m metric) float64 { return m.of(s).Median }
	ofFloor, hasFloor := metric(iops).ratio(s, r.first(floor))
	cpuOfFloor, _ := metric(serverCPU).ratio(s, r.first(floor))
	lead, hasLead := metric(iops).ratio(r.first(ours), s)
	return fmt.Sprintf("%s\t%s\t%s%s\t%s–%s\t%s\t%s\t%s\t%s\t%s\t%.1f\t%.1f",
		r.Case, s.Name, short(all.Median), unit, short(all.Low), short(all.High),
		number(ofFloor.Median, hasFloor), number(lead.Median, hasLead),
		number(lead.Low, hasLead)+"–"+number(lead.High, hasLead),
		number(usual(serverCPU), usual(serverCPU) > 0), number(cpuOfFloor.Median, hasFloor && usual(serverCPU) > 0),
		usual(func(v sample) float64 { return v.P50 }), usual(func(v sample) float64 { return v.P99 }))
}

// rate is how the speed of a case is usually given.
func (r *result) rate() (metric, string) {
	if r.block >= 64<<10 {
		return func(s sample) float64 { return s.MBps }, " MB/s"
	}
	return func(s sample) float64 { return s.IOPS / 1000 }, "k"
}

func short(v float64) string { return fmt.Sprintf("%.4g", v) }

func number(v float64, known bool) string {
	if !known {
		return "-"
	}
	return fmt.Sprintf("%.2f", v)
}

// brief makes one line of an error.
func brief(s string) string {
	const length = 120
	line := []rune(strings.Join(strings.Fields(s), " "))
	return string(line[:min(len(line), length)])
}
