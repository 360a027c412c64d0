package nbdnl_test

import (
	"os"
	"testing"

	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

func TestMain(m *testing.M) { os.Exit(nbdnltest.Main(m)) }
