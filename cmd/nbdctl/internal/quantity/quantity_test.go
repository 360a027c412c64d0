package quantity_test

import (
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/quantity"
)

func TestParseSize(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want int64
		ok   bool
	}{
		{"0", 0, true},
		{"1048576", 1 << 20, true},
		{"4k", 4 << 10, true},
		{"4K", 4 << 10, true},
		{"512M", 512 << 20, true},
		{"512 MiB", 512 << 20, true},
		{"10GiB", 10 << 30, true},
		{"10GB", 10_000_000_000, true},
		{"1T", 1 << 40, true},
		{"7E", 7 << 60, true},
		{"9223372036854775807", 1<<63 - 1, true},
		{"8E", 0, false},
		{"9223372036854775808", 0, false},
		{"99999999999999999999999", 0, false},
		{"", 0, false},
		{"M", 0, false},
		{"-1", 0, false},
		{"+1", 0, false},
		{"1.5G", 0, false},
		{"1e6", 0, false},
		{"0x10", 0, false},
		{"10Q", 0, false},
		{"10 G x", 0, false},
	} {
		got, err := quantity.ParseSize(tt.in)
		if got != tt.want || (err == nil) != tt.ok {
			t.Errorf("ParseSize(%q) = %d, %v; want %d, ok %v", tt.in, got, err, tt.want, tt.ok)
		}
	}
}

func TestFormatSize(t *testing.T) {
	for n, want := range map[int64]string{
		0:             "0",
		1023:          "1023",
		1024:          "1K",
		1023 << 10:    "1023K",
		1<<20 - 1:     "1.0M",
		1<<20 + 1:     "1.0M",
		512 << 20:     "512M",
		1536 << 20:    "1.5G",
		1 << 40:       "1T",
		1<<50 - 1<<40: "1023T",
		1<<50 - 1:     "1.0P",
		1<<60 - 1<<49: "1023.5P",
		1<<63 - 1:     "8E",
	} {
		if got := quantity.FormatSize(n); got != want {
			t.Errorf("FormatSize(%d) = %q, want %q", n, got, want)
		}
	}
}

func TestParseSeconds(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want time.Duration
		ok   bool
	}{
		{"30s", 30 * time.Second, true},
		{"30", 30 * time.Second, true},
		{"2m", 2 * time.Minute, true},
		{"24h", 24 * time.Hour, true},
		{"1s", time.Second, true},
		{"0", 0, false},
		{"0s", 0, false},
		{"-5s", 0, false},
		{"1500ms", 0, false},
		{"1.5s", 0, false},
		{"25h", 0, false},
		{"9223372036854775807", 0, false},
		{"soon", 0, false},
		{"", 0, false},
	} {
		got, err := quantity.ParseSeconds(tt.in, time.Second, 24*time.Hour)
		if got != tt.want || (err == nil) != tt.ok {
			t.Errorf("ParseSeconds(%q) = %v, %v; want %v, ok %v", tt.in, got, err, tt.want, tt.ok)
		}
	}
}

func TestFormatSeconds(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0:                "0s",
		30 * time.Second: "30s",
		90 * time.Second: "1m30s",
		5 * time.Minute:  "5m",
		24 * time.Hour:   "24h",
	} {
		if got := quantity.FormatSeconds(d); got != want {
			t.Errorf("FormatSeconds(%d) = %q, want %q", d, got, want)
		}
	}
}

func FuzzParseSize(f *testing.F) {
	for _, s := range []string{"0", "512M", "10GiB", "8E", "-1", "1 k"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if n, err := quantity.ParseSize(s); n < 0 || err != nil && n != 0 {
			t.Errorf("ParseSize(%q) = %d, %v", s, n, err)
		}
	})
}
