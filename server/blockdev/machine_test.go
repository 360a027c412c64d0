package blockdev

import (
	"cmp"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/nbdctl/nbdctl/nbdnl"
)

// TestTune holds which settings each kernel gets, and that a backend's limit is not exceeded.
func TestTune(t *testing.T) {
	tests := []struct {
		name     string
		release  string
		hardware string
		maximum  int
		readOnly bool // what is in the queue's directory can't be changed

		scheduler, sectors string
		sendBuffer         int
		fails              bool
	}{
		{name: "6.1", release: "6.1.0", hardware: "32768\n", scheduler: "old", sectors: "1024"},
		{name: "6.2", release: "6.2.0", hardware: "32768\n", scheduler: "none", sectors: "1024", sendBuffer: 8 << 20},
		{
			name: "6.12", release: "6.12.107-amd64", hardware: "32768\n",
			scheduler: "none", sectors: "1024", sendBuffer: 8 << 20,
		},
		{name: "7.1", release: "7.1.9", hardware: "32768\n", scheduler: "none", sectors: "1024", sendBuffer: 8 << 20},
		{name: "7.2", release: "7.2.13", hardware: "32768\n", scheduler: "old", sectors: "1024"},
		{name: "10.0", release: "10.0.0", hardware: "32768\n", scheduler: "old", sectors: "1024"},
		{name: "small hardware", release: "6.1.0", hardware: "512\n", scheduler: "old", sectors: "512"},
		{
			name: "small backend", release: "6.1.0", hardware: "32768\n",
			maximum: 128<<10 + 512, scheduler: "old", sectors: "128",
		},
		{
			name: "large backend", release: "6.1.0", hardware: "32768\n",
			maximum: 64 << 20, scheduler: "old", sectors: "1024",
		},
		{name: "refused", release: "6.12.0", hardware: "32768\n", readOnly: true},
		{
			name: "refused, and a small backend", release: "6.12.0", hardware: "32768\n",
			maximum: 4096, readOnly: true, fails: true,
		},
		{name: "unknown kernel", release: "?", hardware: "32768\n", scheduler: "old", sectors: "1024"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := machine{system: nbdnl.System{Root: t.TempDir()}}
			queue := filepath.Dir(m.queue(3, "scheduler"))
			write := func(path, content string) {
				t.Helper()
				if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			write(m.path("proc/sys/kernel/osrelease"), tt.release)
			write(filepath.Join(queue, "max_hw_sectors_kb"), tt.hardware)
			for _, setting := range []string{"scheduler", "max_sectors_kb"} {
				if tt.readOnly {
					write(filepath.Join(queue, setting, "a directory can't be written"), "")
				} else {
					write(filepath.Join(queue, setting), "old")
				}
			}

			if got, want := m.sendBuffer(), cmp.Or(tt.sendBuffer, ampleSendBuffer); !tt.readOnly && got != want {
				t.Errorf("send buffer %d, want %d", got, want)
			}
			if err := m.tune(3, tt.maximum, slog.New(slog.DiscardHandler)); (err != nil) != tt.fails {
				t.Errorf("error %v, want one: %t", err, tt.fails)
			}
			for setting, want := range map[string]string{"scheduler": tt.scheduler, "max_sectors_kb": tt.sectors} {
				if got, _ := os.ReadFile(filepath.Join(queue, setting)); string(got) != want {
					t.Errorf("%s is %q, want %q", setting, got, want)
				}
			}
		})
	}
}
