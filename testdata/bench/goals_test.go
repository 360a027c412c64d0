package main

import (
	"regexp"
	"testing"
)

func servers(name string, r role, iops ...float64) *serverResult {
	s := &serverResult{Name: name, Role: r}
	for _, v := range iops {
		s.Samples = append(s.Samples, sample{IOPS: v, ServerUS: 1e6 / v})
	}
	return s
}

func TestRatioIsTakenRoundByRound(t *testing.T) {
	// The machine was three times slower in the second round.
	got, ok := metric(iops).ratio(servers("a", ours, 90, 30, 100), servers("b", floor, 100, 33, 100))
	want := spread{Median: 30. / 33, Low: 0.9, High: 1}
	if !ok || got != want {
		t.Errorf("got %v %v, want %v", got, ok, want)
	}
	if _, ok := metric(iops).ratio(servers("a", ours, 1), servers("b", floor)); ok {
		t.Error("there is a ratio to what was not measured")
	}
}

func TestSpreadOf(t *testing.T) {
	for _, tt := range []struct {
		values []float64
		want   spread
	}{
		{nil, spread{}},
		{[]float64{2}, spread{2, 2, 2}},
		{[]float64{3, 1}, spread{2, 1, 3}},
		{[]float64{9, 1, 2}, spread{2, 1, 9}},
	} {
		if got := spreadOf(tt.values); got != tt.want {
			t.Errorf("%v: got %v, want %v", tt.values, got, tt.want)
		}
	}
}

func TestJudge(t *testing.T) {
	const on = "memory/rr4k-q32" // goals 1 and 4
	theFloor := servers("f", floor, 100)
	tests := []struct {
		name    string
		servers []*serverResult
		one     string
		four    string
	}{
		{"fast", []*serverResult{
			theFloor, servers("n", ours, 95), servers("p", peer, 20),
		}, "yes", "yes"},
		{"below the floor", []*serverResult{
			theFloor, servers("n", ours, 90), servers("p", peer, 20),
		}, "no", "yes"},
		{"the best of the peers counts", []*serverResult{
			theFloor, servers("n", ours, 95), servers("p", peer, 20), servers("q", peer, 50),
		}, "no", "no"},
		{"a peer without a number", []*serverResult{
			theFloor, servers("n", ours, 95), servers("p", peer, 20), servers("q", peer),
		}, "yes", "yes"},
		{"no peer", []*serverResult{
			theFloor, servers("n", ours, 95),
		}, "no", "no"},
		{"failed", []*serverResult{
			theFloor, servers("n", ours), servers("p", peer, 20),
		}, "no", "no"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			outcomes := judge([]*result{{Case: on, Servers: tt.servers}})
			if got := outcomes[0].Met; got != tt.one {
				t.Errorf("goal 1: got %s, want %s", got, tt.one)
			}
			if got := outcomes[3].Met; got != tt.four {
				t.Errorf("goal 4: got %s, want %s", got, tt.four)
			}
			if got := outcomes[1].Met; got != "-" {
				t.Errorf("goal 2, not measured: got %s", got)
			}
		})
	}
}

func TestJudgeClients(t *testing.T) {
	client := func(name string, r role, us, allocations float64) *serverResult {
		return &serverResult{Name: name, Role: r, Samples: []sample{
			{IOPS: 1e5, ServerUS: 2, ClientUS: us, Allocations: allocations},
		}}
	}
	const on, copied = "client/rr4k-q32", "client/copy-c1" // goals 20 and 22, and 21
	tests := []struct {
		name              string
		clients, copiers  []*serverResult
		cpu, copy, allocs string
	}{
		{
			"good", []*serverResult{client("f", floor, 1, 0), client("b", ours, 3, 0), client("libnbd", peer, 9, 0)},
			[]*serverResult{servers("b", ours, 100), servers("nbdcopy", peer, 100)},
			"yes", "yes", "yes",
		},
		{
			"dear and slow", []*serverResult{client("b", ours, 9.1, 0), client("libnbd", peer, 9, 0)},
			[]*serverResult{servers("b", ours, 99), servers("nbdcopy", peer, 100)},
			"no", "no", "yes",
		},
		{
			"fio does not count", []*serverResult{
				client("b", ours, 3, 0), client("libnbd", peer, 9, 0), client("fio", peer, 2, 0),
			}, nil,
			"yes", "-", "yes",
		},
		{
			"an allocation", []*serverResult{client("b", ours, 3, 1), client("libnbd", peer, 9, 0)}, nil,
			"yes", "-", "no",
		},
		{
			"no libnbd", []*serverResult{client("b", ours, 3, 0)}, nil,
			"no", "-", "yes",
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			results := []*result{{Case: on, Servers: tt.clients}}
			if tt.copiers != nil {
				results = append(results, &result{Case: copied, Servers: tt.copiers})
			}
			outcomes := judge(results)
			for goal, want := range map[int]string{20: tt.cpu, 21: tt.copy, 22: tt.allocs} {
				if got := outcomes[goal-1].Met; got != want {
					t.Errorf("goal %d: got %s, want %s", goal, got, want)
				}
			}
		})
	}
}

// A condition on a case that no suite has would never be judged.
func TestGoalsAreMeasured(t *testing.T) {
	measured := map[string]bool{hostileCase: true}
	for _, k := range copyings {
		measured[k.name] = true
	}
	all := suites()
	for _, s := range clientSuites() {
		all = append(all, s.suite)
	}
	for _, s := range deviceSuites(options{wanted: regexp.MustCompile("")}) {
		all = append(all, s.suite)
	}
	for _, s := range all {
		for _, l := range s.selected(regexp.MustCompile("")).loads {
			if measured[s.caseName(l)] {
				t.Errorf("%s is measured twice", s.caseName(l))
			}
			measured[s.caseName(l)] = true
		}
	}
	for i, g := range goals {
		if g.number != i+1 {
			t.Errorf("goal %d is number %d", g.number, i+1)
		}
		for _, c := range g.conditions {
			if !measured[c.on] {
				t.Errorf("goal %d: no suite has %s", g.number, c.on)
			}
		}
	}
	for _, b := range bars {
		if !measured[b.on] {
			t.Errorf("chart: no suite has %s", b.on)
		}
	}
}
