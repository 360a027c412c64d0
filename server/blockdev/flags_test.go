package blockdev_test

import (
	"testing"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/server"
)

// TestFlagsAgree holds the two declarations of the transmission flags equal: what the server promises is what the kernel is told.
func TestFlagsAgree(t *testing.T) {
	for _, tt := range []struct {
		name   string
		kernel nbdnl.Flags
		server server.Flags
	}{
		{"HasFlags", nbdnl.FlagHasFlags, server.FlagHasFlags},
		{"ReadOnly", nbdnl.FlagReadOnly, server.FlagReadOnly},
		{"SendFlush", nbdnl.FlagSendFlush, server.FlagSendFlush},
		{"SendFUA", nbdnl.FlagSendFUA, server.FlagSendFUA},
		{"Rotational", nbdnl.FlagRotational, server.FlagRotational},
		{"SendTrim", nbdnl.FlagSendTrim, server.FlagSendTrim},
		{"SendWriteZeroes", nbdnl.FlagSendWriteZeroes, server.FlagSendWriteZeroes},
		{"CanMultiConn", nbdnl.FlagCanMultiConn, server.FlagCanMultiConn},
	} {
		if nbdnl.Flags(tt.server) != tt.kernel {
			t.Errorf("%s: %#x for the server, %#x for the kernel", tt.name, uint16(tt.server), uint64(tt.kernel))
		}
	}
}
