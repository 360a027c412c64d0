package main

import "slices"

// A spread is a median with what it was taken from.
type spread struct {
	Median float64 `json:"median"`
	Low    float64 `json:"low"`
	High   float64 `json:"high"`
}

// spreadOf returns the zero spread for no values.
func spreadOf(values []float64) spread {
	if len(values) == 0 {
		return spread{}
	}
	v := slices.Sorted(slices.Values(values))
	m := len(v) / 2
	median := v[m]
	if len(v)%2 == 0 {
		median = (v[m-1] + v[m]) / 2
	}
	return spread{Median: median, Low: v[0], High: v[len(v)-1]}
}

// A metric is one of the numbers of a sample.
type metric func(sample) float64

func iops(s sample) float64      { return s.IOPS }
func serverCPU(s sample) float64 { return s.ServerUS }
func clientCPU(s sample) float64 { return s.ClientUS }

// byCPU is the requests in a second of CPU time.
func byCPU(s sample) float64 { return 1e6 / (s.ServerUS + s.ClientUS) }

// of is the spread of a metric over all rounds.
func (m metric) of(s *serverResult) spread {
	values := make([]float64, len(s.Samples))
	for i, v := range s.Samples {
		values[i] = m(v)
	}
	return spreadOf(values)
}

// ratio is the spread of a's metric to b's, round by round: what disturbs the machine for a while
// disturbs both. There is none if one of them has not been measured.
func (m metric) ratio(a, b *serverResult) (spread, bool) {
	if a == nil || b == nil || len(a.Samples) == 0 || len(a.Samples) != len(b.Samples) {
		return spread{}, false
	}
	values := make([]float64, len(a.Samples))
	for i := range values {
		values[i] = m(a.Samples[i]) / m(b.Samples[i])
	}
	return spreadOf(values), true
}

// first returns the server of that role that comes first.
func (r *result) first(wanted role) *serverResult {
	for _, s := range r.Servers {
		if s.Role == wanted && len(s.Samples) > 0 {
			return s
		}
	}
	return nil
}

// named returns the server of that name.
func (r *result) named(name string) *serverResult {
	for _, s := range r.Servers {
		if s.Name == name && len(s.Samples) > 0 {
			return s
		}
	}
	return nil
}

// best returns the peer with the highest rate, by median.
func (r *result) best(rate metric) *serverResult {
	return r.extreme(func(a, b *serverResult) bool { return rate.of(a).Median > rate.of(b).Median })
}

// cheapest returns the peer that takes the least CPU time for a request, by median.
func (r *result) cheapest() *serverResult {
	cost := func(s *serverResult) float64 { return metric(serverCPU).of(s).Median }
	return r.extreme(func(a, b *serverResult) bool { return cost(a) < cost(b) })
}

func (r *result) extreme(better func(a, b *serverResult) bool) *serverResult {
	var chosen *serverResult
	for _, s := range r.Servers {
		if s.Role == peer && len(s.Samples) > 0 && (chosen == nil || better(s, chosen)) {
			chosen = s
		}
	}
	return chosen
}
