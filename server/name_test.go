package server_test

import (
	"errors"
	"net"
	"strings"
	"testing"

	"github.com/nbdctl/nbdctl/server"
	"github.com/nbdctl/nbdctl/server/wire"
)

// TestNames holds which names exports can have, and that a server refuses the others before it
// accepts anybody.
func TestNames(t *testing.T) {
	e := export(t, newDisk(512), server.Options{})
	for _, tt := range []struct {
		name, says string // nothing: it is fine
	}{
		{"", ""},
		{"disk", ""},
		{"Bücher/日本 \n", ""},
		{strings.Repeat("x", 4096), ""},
		{strings.Repeat("x", 4097), "4097 bytes"},
		{strings.Repeat("ü", 2049), "4098 bytes"},
		{"a\xffb", `"a\xffb" is not UTF-8`},
		{"a\x00b", "zero byte"},
	} {
		err := wire.CheckString(tt.name)
		if tt.says == "" && err != nil || tt.says != "" && (err == nil || !strings.Contains(err.Error(), tt.says)) {
			t.Errorf("a name of %d bytes: %v, want %q", len(tt.name), err, tt.says)
		}
		d := newDialer()
		d.Close()
		s := &server.Server{Exports: map[string]*server.Export{"": e, tt.name: e}}
		if served := s.Serve(d); tt.says == "" && !errors.Is(served, net.ErrClosed) ||
			tt.says != "" && !strings.Contains(served.Error(), err.Error()) {
			t.Errorf("Serve with a name of %d bytes: %v", len(tt.name), served)
		}
	}
	d := newDialer()
	if err := (&server.Server{Exports: map[string]*server.Export{"none": nil}}).Serve(d); err == nil ||
		!strings.Contains(err.Error(), `"none" is nil`) {
		t.Errorf("without an export: %v", err)
	}
	select {
	case <-d.closed:
	default:
		t.Error("the listener is left open")
	}
}
