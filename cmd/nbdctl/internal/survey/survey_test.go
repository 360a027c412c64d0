package survey

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"testing"

	"github.com/nbdctl/nbdctl/backends/nbd"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/server/wire"
)

// TestExplain holds the codes that are documented for info and connect to errors of the client.
func TestExplain(t *testing.T) {
	refused := func(r wire.OptionReply) error { return &nbd.OptionError{Option: wire.OptGo, Reply: r} }
	for _, tt := range []struct {
		err  error
		want exit.Code
	}{
		{nil, exit.OK},
		{refused(wire.RepErrUnknown), exit.NotFound},
		{refused(wire.RepErrTLSRequired), exit.Permission},
		{refused(wire.RepErrPolicy), exit.Permission},
		{refused(wire.RepErrUnsup), exit.Failure}, // It is the server's lack.
		{fmt.Errorf("nbd: TLS: %w", &tls.CertificateVerificationError{Err: errors.New("expired")}), exit.Permission},
		{&net.OpError{Op: "remote error", Err: errors.New("tls: certificate required")}, exit.Permission},
		{&net.OpError{Op: "dial", Err: fs.ErrNotExist}, exit.Failure}, // No socket is no missing export.
	} {
		if got := exit.Of(Explain(tt.err)); got != tt.want {
			t.Errorf("%v has code %d, want %d", tt.err, got, tt.want)
		}
	}
}

// TestMeaning holds what flags of the known contexts mean, also with bits that are not known.
func TestMeaning(t *testing.T) {
	for _, tt := range []struct {
		context string
		flags   uint64
		want    string // "": not known
	}{
		{"base:allocation", 0, "data"},
		{"base:allocation", 1, "hole"},
		{"base:allocation", 2, "zero"},
		{"base:allocation", 7, "hole,zero"},
		{"qemu:dirty-bitmap:b0", 0, "clean"},
		{"qemu:dirty-bitmap:b0", 3, "dirty"},
		{"qemu:allocation-depth", 0, "unallocated"},
		{"qemu:allocation-depth", 1, "local"},
		{"qemu:allocation-depth", 2, "backing depth 2"},
		{"x-test:page", 1, ""},
	} {
		got := meaning(tt.context, tt.flags)
		if got == nil && tt.want != "" || got != nil && *got != tt.want {
			t.Errorf("%s, %d: %v, want %q", tt.context, tt.flags, got, tt.want)
		}
	}
}
