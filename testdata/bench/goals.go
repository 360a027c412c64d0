package main

import (
	"fmt"
	"strings"
)

// A goal is met if all its conditions are.
type goal struct {
	number     int
	text       string
	conditions []condition
}

// A condition holds one number of one case against a limit.
type condition struct {
	on    string // case
	what  yardstick
	limit float64
}

// A yardstick is a number of what is under test, or its ratio to that of another server; less tells
// that it has to be at most the limit, and not at least.
type yardstick struct {
	name string
	less bool
	// number is of requests in a second if it is nil, and then given what to take for that.
	number metric
	// other chooses the other server.
	other func(r *result, rate metric) *serverResult
}

// Of requests in a second, unless CPU is said, which is the CPU time for one: of the server, or of
// the client where that is said.
var (
	ofFloor     = yardstick{name: "of floor", other: theFloorOf}
	ofPeer      = yardstick{name: "of best peer", other: (*result).best}
	ofNbdkit    = yardstick{name: "of nbdkit", other: nbdkitOf}
	ofQEMU      = yardstick{name: "of qemu-nbd -c", other: qemuOf}
	cpuFloor    = yardstick{name: "CPU of floor", less: true, number: serverCPU, other: theFloorOf}
	cpuCheapest = yardstick{name: "CPU of cheapest peer", less: true, number: serverCPU, other: cheapestOf}
	cpuPeer     = yardstick{name: "CPU of best peer", less: true, number: serverCPU, other: (*result).best}
	cpuLibnbd   = yardstick{name: "client CPU of libnbd", less: true, number: clientCPU, other: libnbdOf}
	allocations = yardstick{name: "allocations per request", less: true, number: allocated}
)

func theFloorOf(r *result, _ metric) *serverResult { return r.first(floor) }
func nbdkitOf(r *result, _ metric) *serverResult   { return r.named("nbdkit") }
func qemuOf(r *result, _ metric) *serverResult     { return r.named("qemu-nbd -c") }
func cheapestOf(r *result, _ metric) *serverResult { return r.cheapest() }
func libnbdOf(r *result, _ metric) *serverResult   { return r.named("libnbd") }
func allocated(s sample) float64                   { return s.Allocations }

// of is the number of a server of r.
func (y yardstick) of(s *serverResult, r *result, rate metric) (spread, bool) {
	number := y.number
	if number == nil {
		number = rate
	}
	if y.other == nil {
		return number.of(s), true
	}
	return number.ratio(s, y.other(r, rate))
}

// noAllocation, for each request, is what the runtime and the counting itself may do.
const noAllocation = 0.01

var goals = []goal{
	{1, "memory, 4k random reads, 32 in flight", []condition{
		{"memory/rr4k-q32", ofPeer, 4},
		{"memory/rr4k-q32", ofFloor, 0.92},
	}},
	{2, "memory, 4k random writes, 32 in flight", []condition{
		{"memory/rw4k-q32", ofPeer, 4.5},
		{"memory/rw4k-q32", ofFloor, 0.88},
	}},
	{3, "memory, 4k, 70 % reads, 32 in flight", []condition{
		{"memory/mix4k-q32", ofPeer, 4},
	}},
	{4, "CPU time for 4k, 32 in flight", []condition{
		{"memory/rr4k-q32", cpuFloor, 1.15},
		{"memory/rr4k-q32", cpuCheapest, 1. / 4},
		{"memory/rw4k-q32", cpuFloor, 1.2},
		{"memory/rw4k-q32", cpuCheapest, 1. / 4},
	}},
	{5, "4k, 32 in flight, framed as the kernel does", []condition{
		{"memory/rr4k-q32-k", ofPeer, 1.6},
		{"memory/rr4k-q32-k", cpuFloor, 1.1},
		{"memory/rr4k-q32-k", cpuCheapest, 1 / 1.8},
		{"memory/rw4k-q32-k", ofPeer, 1.9},
		{"memory/rw4k-q32-k", cpuFloor, 1.1},
		{"memory/rw4k-q32-k", cpuCheapest, 1 / 1.8},
	}},
	{6, "4k reads, one in flight", []condition{
		{"memory/rr4k-q1", ofPeer, 1.15},
		{"memory/rr4k-q1", ofFloor, 0.85},
		{"memory/rr4k-q1", cpuFloor, 1.25},
	}},
	{7, "128k, 16 in flight", []condition{
		{"memory/rr128k-q16", ofPeer, 1.1},
		{"memory/rr128k-q16", ofFloor, 0.93},
		{"memory/rr128k-q16", cpuCheapest, 1 / 1.25},
		{"memory/rw128k-q16", ofPeer, 1.1},
		{"memory/rw128k-q16", ofFloor, 1},
	}},
	{8, "1M sequential, 8 in flight", []condition{
		{"memory/sr1m-q8", ofPeer, 1.1},
		{"memory/sr1m-q8", ofFloor, 0.93},
		{"memory/sw1m-q8", ofPeer, 1.3},
		{"memory/sw1m-q8", ofFloor, 0.93},
	}},
	{9, "4 connections, 4k, 32 in flight, all processors", []condition{
		{"memory-unpinned/rr4k-q32-c4", ofPeer, 3.5},
		{"memory-unpinned/rr4k-q32-c4", ofFloor, 0.8},
		{"memory-unpinned/rw4k-q32-c4", ofPeer, 4},
		{"memory-unpinned/rw4k-q32-c4", ofFloor, 0.8},
	}},
	{10, "file in the page cache, 4k, 32 in flight", []condition{
		{"file/rr4k-q32", ofPeer, 3.5},
		{"file/rw4k-q32", ofPeer, 2},
		{"file/mix4k-q32", ofPeer, 2},
	}},
	{11, "file in the page cache, large reads", []condition{
		{"file/rr128k-q16", ofPeer, 1.3},
		{"file/rr128k-q16", cpuPeer, 1 / 2.5},
		{"file/sr1m-q8", ofPeer, 1.2},
		{"file/sr1m-q8", cpuPeer, 1 / 2.5},
	}},
	{12, "file, large writes", []condition{
		{"file/rw128k-q16", ofPeer, 0.95},
		{"file/sw1m-q8", ofPeer, 0.95},
		{"file-unpinned/sw1m-q8", ofPeer, 1.1},
	}},
	{13, "TCP to the same machine", []condition{
		{"tcp/rr4k-q32", ofNbdkit, 4},
		{"tcp/rw4k-q32", ofNbdkit, 4},
		{"tcp/rr128k-q16", ofNbdkit, 1.15},
		{"tcp/rw128k-q16", ofNbdkit, 1.15},
	}},
	{14, "a backend that takes 200 µs; floor: a goroutine for each request", []condition{
		{"sleep/rr4k-q32", ofFloor, 0.9},
		{"sleep/rw4k-q32", ofFloor, 0.9},
		{"nanosleep-unpinned/rr4k-q32", ofFloor, 0.9},
		{"nanosleep-unpinned/rw4k-q32", ofFloor, 0.9},
	}},
	{15, "no allocation for a request; GOGC=10 (floor: off)", []condition{
		{"allocations/rr4k-q1", allocations, noAllocation},
		{"allocations/rr4k-q32", allocations, noAllocation},
		{"allocations/rw4k-q32", allocations, noAllocation},
		{"allocations/rr128k-q16", allocations, noAllocation},
		{"allocations/rw128k-q16", allocations, noAllocation},
		{"allocations/sr1m-q8", allocations, noAllocation},
		{"allocations/sw1m-q8", allocations, noAllocation},
		{"gogc/rr4k-q32", ofFloor, 0.97},
		{"gogc/rw4k-q32", ofFloor, 0.97},
	}},
	{16, "a backend of ReadAt and WriteAt alone", []condition{
		{"plain/rr4k-q32", ofFloor, 0.9},
		{"plain/rw4k-q32", ofFloor, 0.9},
		{"plain/sr1m-q8", ofFloor, 0.75},
		{"plain/sw1m-q8", ofFloor, 0.75},
	}},
	{17, "structured replies; floor: simple ones of nbdctl", []condition{
		{"structured/rr4k-q32-x", ofPeer, 1},
		{"structured/rr128k-q16-x", ofPeer, 1},
		{"structured/er128k-q16-x", ofPeer, 1},
		{"forms/rr4k-q32", ofFloor, 0.95},
	}},
	{18, "TLS", []condition{
		{"tls/rr4k-q32", ofPeer, 1},
		{"tls/rw4k-q32", ofPeer, 1},
		{"tls/rr128k-q16", ofPeer, 1},
		{"tls/rw128k-q16", ofPeer, 1},
	}},
	{19, "attackers on another processor; floor: none", []condition{
		{hostileCase, ofFloor, 0.8},
	}},
	{20, "client, 4k, 32 in flight", []condition{
		{"client/rr4k-q32", cpuLibnbd, 1},
		{"client/rw4k-q32", cpuLibnbd, 1},
		{"client/rr4k-q32-apart", cpuLibnbd, 1},
		{"client/rw4k-q32-apart", cpuLibnbd, 1},
	}},
	{21, "client, copies of a whole image", []condition{
		{"client/copy-null-c1", ofPeer, 1},
		{"client/copy-null-c4", ofPeer, 1},
		{"client/copy-c1", ofPeer, 1},
		{"client/copy-c4", ofPeer, 1},
	}},
	{22, "client, no allocation for a request", []condition{
		{"client/rr4k-q1", allocations, noAllocation},
		{"client/rr4k-q32", allocations, noAllocation},
		{"client/rw4k-q32", allocations, noAllocation},
		{"client/rr128k-q16", allocations, noAllocation},
		{"client/sr1m-q4", allocations, noAllocation},
	}},
	// With nbd-client the kernel speaks with the server as with ours: that row is for the eye.
	{23, "exports of other servers as devices, direct", []condition{
		{"remote/rr4k-q1", ofQEMU, 1},
		{"remote/rw4k-q1", ofQEMU, 1},
		{"remote/rr4k-q32", ofQEMU, 1},
		{"remote/rw4k-q32", ofQEMU, 1},
		{"remote/rr128k-q32", ofQEMU, 1},
		{"remote/rw128k-q32", ofQEMU, 1},
	}},
	{24, "account kept of what is under way; floor: none", []condition{
		{"ledger/rr4k-q32", cpuFloor, 1.02},
		{"ledger/rw4k-q32", cpuFloor, 1.02},
		{"ledger/rr4k-q32-k", cpuFloor, 1.02},
		{"ledger/rw4k-q32-k", cpuFloor, 1.02},
	}},
}

// An outcome is what became of a goal.
type outcome struct {
	Number int     `json:"number"`
	Text   string  `json:"text"`
	Met    string  `json:"met"` // yes, no, or - if it was not measured
	Checks []check `json:"checks"`
}

// A check is what became of a condition.
type check struct {
	Case     string  `json:"case"`
	What     string  `json:"what"`
	Limit    float64 `json:"limit"`
	AtMost   bool    `json:"at_most"`
	Measured spread  `json:"measured"`
	// ByCPU is the same of the requests in a second of CPU time, of client and server together.
	// With both on one processor this is what it is without anybody else, and where the two differ
	// somebody was.
	ByCPU *spread `json:"by_cpu,omitempty"`
	// Floor is the same of the floor, which no server is expected to beat.
	Floor *spread `json:"floor,omitempty"`
	Met   bool    `json:"met"`
}

func (c check) String() string {
	sign, mark := "≥", ""
	if c.ByCPU != nil {
		mark = fmt.Sprintf("; by CPU time %.3g", c.ByCPU.Median)
	}
	if c.Floor != nil {
		mark += fmt.Sprintf("; the floor %.3g", c.Floor.Median)
	}
	if c.AtMost {
		sign = "≤"
	}
	if !c.Met {
		mark += " (!)"
	}
	m := c.Measured
	return fmt.Sprintf("%s %s %s%.3g: %.3g [%.3g–%.3g]%s",
		c.Case, c.What, sign, c.Limit, m.Median, m.Low, m.High, mark)
}

// judge holds the results against the goals. Of a goal that was selected in part only that part
// counts; a case of which what is needed has failed is not met.
func judge(results []*result) []outcome {
	byCase := make(map[string]*result)
	for _, r := range results {
		byCase[r.Case] = r
	}
	var outcomes []outcome
	for _, g := range goals {
		o := outcome{Number: g.number, Text: g.text, Met: "-"}
		for _, c := range g.conditions {
			r := byCase[c.on]
			if r == nil {
				continue
			}
			k := c.check(r)
			o.Checks = append(o.Checks, k)
			switch {
			case !k.Met:
				o.Met = "no"
			case o.Met == "-":
				o.Met = "yes"
			}
		}
		outcomes = append(outcomes, o)
	}
	return outcomes
}

func (c condition) check(r *result) check {
	k := check{Case: c.on, What: c.what.name, Limit: c.limit, AtMost: c.what.less}
	subject := r.first(ours)
	if subject == nil {
		return k
	}
	measured, ok := c.what.of(subject, r, iops)
	k.Measured = measured
	if byCPU, ok := c.what.of(subject, r, byCPU); ok && c.what.number == nil && r.busy {
		k.ByCPU = &byCPU
	}
	if least := r.first(floor); c.what.other != nil && least != nil && c.what.other(r, iops) != least {
		if of, ok := c.what.of(least, r, iops); ok {
			k.Floor = &of
		}
	}
	k.Met = ok && measured.Median >= c.limit
	if c.what.less {
		k.Met = ok && measured.Median <= c.limit
	}
	return k
}

// goalsTable prints the goals.
func goalsTable(outcomes []outcome) string {
	var b strings.Builder
	for _, o := range outcomes {
		fmt.Fprintf(&b, "%2d  %-4s %s\n", o.Number, o.Met, o.Text)
		for _, c := range o.Checks {
			fmt.Fprintf(&b, "         %s\n", c)
		}
	}
	return b.String()
}
