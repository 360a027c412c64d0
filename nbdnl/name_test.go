package nbdnl_test

import (
	"encoding"
	"regexp"
	"testing"

	"github.com/nbdctl/nbdctl/nbdnl"
)

func TestParseIndex(t *testing.T) {
	for in, want := range map[string]int{
		"nbd5": 5, "/dev/nbd5": 5, "5": 5, "0": 0, "nbd0": 0, "nbd1048575": 1048575,
	} {
		if got, err := nbdnl.ParseIndex(in); err != nil || got != want {
			t.Errorf("%q is %d, %v, want %d", in, got, err, want)
		}
	}
	for _, in := range []string{
		"", "nbd", "/dev/", "/dev/5", "/dev/nbd", "nbd-1", "-1", "+1", "nbd05", "nbd5p1", "5 ", "nbdnbd5", "sda",
		"1048576", "99999999999999999999", "/dev/nbd/5", "/dev//nbd5",
	} {
		if got, err := nbdnl.ParseIndex(in); err == nil {
			t.Errorf("%q is %d, want an error", in, got)
		}
	}
	if got := nbdnl.Path(3); got != "/dev/nbd3" {
		t.Errorf("path of 3 is %s", got)
	}
}

func TestNewIdentifier(t *testing.T) {
	form := regexp.MustCompile(`^test:[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)
	seen := make(map[string]bool)
	for range 100 {
		id := nbdnl.NewIdentifier("test")
		if !form.MatchString(id) || seen[id] {
			t.Fatalf("identifier %q is malformed, or repeats itself", id)
		}
		seen[id] = true
	}
}

func TestNames(t *testing.T) {
	tests := []struct {
		value encoding.TextMarshaler
		want  string
	}{
		{nbdnl.StateIdle, "idle"}, {nbdnl.StateHeld, "held"}, {nbdnl.StateConnecting, "connecting"},
		{nbdnl.StateLive, "live"}, {nbdnl.StateDegraded, "degraded"}, {nbdnl.StateWaiting, "waiting"},
		{nbdnl.StateDisconnecting, "disconnecting"}, {nbdnl.StateOrphaned, "orphaned"},
		{nbdnl.ModeNone, "none"}, {nbdnl.ModeNetlink, "netlink"}, {nbdnl.ModeIoctl, "ioctl"},
		{nbdnl.ModeUnknown, "unknown"},
	}
	for _, tt := range tests {
		text, err := tt.value.MarshalText()
		if string(text) != tt.want || err != nil {
			t.Errorf("%v is %q, %v, want %q", tt.value, text, err, tt.want)
		}
		if _, ok := tt.value.(nbdnl.State); ok {
			var back nbdnl.State
			if err := back.UnmarshalText(text); err != nil || back != tt.value {
				t.Errorf("%q is %v, %v", text, back, err)
			}
		}
	}
	if text, err := nbdnl.State(99).MarshalText(); err == nil {
		t.Errorf("state 99 is %q", text)
	}
	var s nbdnl.State
	if err := s.UnmarshalText([]byte("gone")); err == nil {
		t.Errorf("gone is %v", s)
	}
}
