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
	if os.Getenv(poolRole) != "" {
		return m.Run() // Devices of others are there meanwhile, and are no leftovers.
	}
	return nbdnltest.Main(m)
}

// poolRole is set for the other processes of the tests of pools.
const poolRole = "NBD_TEST_POOL_ROLE"
