package main

import (
	"strings"
	"testing"
)

// TestOrdered puts devices that are stored on each other into the order in which
// they can go, and lets none wait for itself.
func TestOrdered(t *testing.T) {
	for _, tt := range []struct {
		all, on string // "ba": b is stored on a
		order   string
		waits   string // who waits for whom
	}{
		{"abc", "", "abc", ""},
		{"abc", "ba cb", "cba", "ab bc"},
		{"cba", "ba cb", "cba", "ab bc"},
		{"abcd", "ba ca db dc", "dbca", "ab ac bd cd"},
		{"abcd", "da", "dabc", "ad"},
		{"ab", "ba ab", "ba", "ab"}, // which can't be, and must not hang
		{"a", "aa", "a", ""},
	} {
		targets := make(map[*target]string)
		var all []*target
		for _, n := range strings.Split(tt.all, "") {
			all = append(all, &target{})
			targets[all[len(all)-1]] = n
		}
		var order strings.Builder
		waits := make(map[string]bool)
		for _, t := range ordered(all, func(upper, lower *target) bool {
			return strings.Contains(tt.on, targets[upper]+targets[lower])
		}) {
			order.WriteString(targets[t])
			for _, upper := range t.above {
				waits[targets[t]+targets[upper]] = true
			}
		}
		if order.String() != tt.order {
			t.Errorf("%s with %q go in the order %s, want %s", tt.all, tt.on, order.String(), tt.order)
		}
		want := strings.Fields(tt.waits)
		for _, w := range want {
			if !waits[w] {
				t.Errorf("%s with %q: %s does not wait for %s", tt.all, tt.on, w[:1], w[1:])
			}
		}
		if len(waits) != len(want) {
			t.Errorf("%s with %q: waits are %v, want %v", tt.all, tt.on, waits, want)
		}
	}
}
