package blockdev_test

import (
	"fmt"
	"os"
	"testing"

	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

func TestMain(m *testing.M) { os.Exit(run(m)) }

// run keeps the claims of tests on a fake kernel away from those of real devices.
func run(m *testing.M) int {
	if os.Getenv("NBDCTL_STATE_DIR") == "" {
		dir, err := os.MkdirTemp("", "nbdctl")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		os.Setenv("NBDCTL_STATE_DIR", dir)
	}
	return nbdnltest.Main(m)
}
