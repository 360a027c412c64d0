package doctor

import (
	"os"
	"strings"
	"testing"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
)

// TestState shows what is said of state directories.
func TestState(t *testing.T) {
	for _, tt := range []struct {
		name string
		make string // the directory that exists, "" for none
		mode os.FileMode
		want Result
		says string
	}{
		{"not there", "", 0, OK, "/run/nbdctl will be made when it is needed"},
		{"good", "run/nbdctl", 0o755, OK, "/run/nbdctl"},
		{"writable by others", "run/nbdctl", 0o777, Problem, "can be written by others (mode 0777)"},
		{"secret", "run/nbdctl", 0o700, Warning, "can't be read by everybody (mode 0700)"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := healthy.machine(t)
			if tt.make != "" {
				dir := m.path(tt.make)
				if err := os.MkdirAll(dir, 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.Chmod(dir, tt.mode); err != nil {
					t.Fatal(err)
				}
			}
			f := m.StateDirectory("/run/nbdctl").Look(t.Context())[0]
			if f.Result != tt.want || !strings.Contains(f.Seen, tt.says) {
				t.Errorf("%v, want %s and %q", f, tt.want, tt.says)
			}
		})
	}
	m := healthy.with(files{"run/nbdctl": "a file"}).machine(t)
	f := m.stateDirectory("/run/nbdctl")
	if f.Result != Problem || f.Remedy != "rm /run/nbdctl" || f.Code != exit.Failure {
		t.Error(f)
	}
}
