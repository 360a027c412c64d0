package blockdev_test

import (
	"testing"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/server/wire"
)

// TestFlagsAgree holds the two declarations of the transmission flags equal: what the server
// promises is what the kernel is told.
func TestFlagsAgree(t *testing.T) {
	for _, tt := range []struct {
		name   string
		kernel nbdnl.Flags
		server wire.Flags
	}{
		{"HasFlags", nbdnl.FlagHasFlags, wire.FlagHasFlags},
		{"ReadOnly", nbdnl.FlagReadOnly, wire.FlagReadOnly},
		{"SendFlush", nbdnl.FlagSendFlush, wire.FlagSendFlush},
		{"SendFUA", nbdnl.FlagSendFUA, wire.FlagSendFUA},
		{"Rotational", nbdnl.FlagRotational, wire.FlagRotational},
		{"SendTrim", nbdnl.FlagSendTrim, wire.FlagSendTrim},
		{"SendWriteZeroes", nbdnl.FlagSendWriteZeroes, wire.FlagSendWriteZeroes},
		{"CanMultiConn", nbdnl.FlagCanMultiConn, wire.FlagCanMultiConn},
	} {
		if nbdnl.Flags(tt.server) != tt.kernel {
			t.Errorf("%s: %#x for the server, %#x for the kernel", tt.name, uint16(tt.server), uint64(tt.kernel))
		}
	}
}
