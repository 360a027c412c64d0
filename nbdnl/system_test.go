package nbdnl_test

import (
	"testing"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/claim"
)

// TestClaims holds where the programs of a machine meet. The environment has no say in it.
func TestClaims(t *testing.T) {
	t.Setenv("NBDCTL_STATE_DIR", t.TempDir())
	for name, tt := range map[string]struct {
		system nbdnl.System
		want   claim.Dir
	}{
		"the running machine": {nbdnl.System{}, "/run/nbdctl"},
		"another root":        {nbdnl.System{Root: "/host"}, "/host/run/nbdctl"},
		"another directory":   {nbdnl.System{Root: "/host", StateDir: "/srv/state"}, "/srv/state"},
	} {
		if got := tt.system.Claims(); got != tt.want {
			t.Errorf("%s: %q, want %q", name, got, tt.want)
		}
	}
}
