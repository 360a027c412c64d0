package nbdnl_test

import (
	"testing"

	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// What this kernel's driver does, and those of others do not, is as it has been seen.
func TestKernelFeatures(t *testing.T) {
	nbdnltest.RequireKernel(t)
	for _, f := range nbdnltest.Features {
		f.Report(t)
	}
}
