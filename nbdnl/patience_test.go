package nbdnl

import (
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl/holder"
)

func TestPatience(t *testing.T) {
	process := func(comm string) holder.Holder { return holder.Holder{Kind: holder.Process, PID: 1, Comm: comm} }
	tests := []struct {
		name    string
		holders []holder.Holder
		want    time.Duration
	}{
		{"nobody known", nil, time.Second},
		{"a program", []holder.Holder{process("fio")}, time.Second},
		{"udev", []holder.Holder{process("(udev-worker)"), process("systemd-udevd")}, 15 * time.Second},
		{"udev and a program", []holder.Holder{process("(udev-worker)"), process("fio")}, time.Second},
		{"a mount", []holder.Holder{process("(udev-worker)"), {Kind: holder.Mount}}, 0},
		{"swap", []holder.Holder{{Kind: holder.Swap}}, 0},
	}
	for _, tt := range tests {
		if got := patience(tt.holders, time.Second); got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
}
