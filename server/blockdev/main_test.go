package blockdev_test

import (
	"os"
	"testing"

	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	if os.Getenv(poolRole) != "" {
		return m.Run() // Devices of others are there meanwhile, and are no leftovers.
	}
	return nbdnltest.Main(m)
}

// poolRole is set for the other processes of the tests of pools.
const poolRole = "NBD_TEST_POOL_ROLE"
