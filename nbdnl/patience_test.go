package nbdnl

import (
	"testing"
	"time"
)

func TestPatience(t *testing.T) {
	process := func(comm string) Holder { return Holder{Kind: HolderProcess, PID: 1, Comm: comm} }
	tests := []struct {
		name    string
		holders []Holder
		want    time.Duration
	}{
		{"nobody known", nil, time.Second},
		{"a program", []Holder{process("fio")}, time.Second},
		{"udev", []Holder{process("(udev-worker)"), process("systemd-udevd")}, 15 * time.Second},
		{"udev and a program", []Holder{process("(udev-worker)"), process("fio")}, time.Second},
		{"a mount", []Holder{process("(udev-worker)"), {Kind: HolderMount}}, 0},
		{"swap", []Holder{{Kind: HolderSwap}}, 0},
	}
	for _, tt := range tests {
		if got := patience(tt.holders, time.Second); got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
}
