package wire_test

import (
	"bytes"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/server/wire"
)

func TestDecodeRequest(t *testing.T) {
	want := wire.Request{
		Flags: wire.CmdFlagFUA, Command: wire.CmdWriteZeroes, Cookie: 0x0102030405060708, Offset: 1<<32 + 4096,
		Length: 0xfffffe00,
	}
	compact := [wire.RequestSize]byte{
		0x25, 0x60, 0x95, 0x13, // magic
		0x00, 0x01, // flags
		0x00, 0x06, // type
		1, 2, 3, 4, 5, 6, 7, 8, // cookie
		0, 0, 0, 1, 0, 0, 0x10, 0x00, // offset
		0xff, 0xff, 0xfe, 0x00, // length
	}
	extended := [wire.ExtendedRequestSize]byte{
		0x21, 0xe4, 0x1c, 0x71,
		0x00, 0x01,
		0x00, 0x06,
		1, 2, 3, 4, 5, 6, 7, 8,
		0, 0, 0, 1, 0, 0, 0x10, 0x00,
		0, 0, 0, 0, 0xff, 0xff, 0xfe, 0x00,
	}
	var got wire.Request
	if err := got.Decode(&compact); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("request (-want +got):\n%s", diff)
	}
	if b := want.Append(nil); !bytes.Equal(b, compact[:]) {
		t.Errorf("request % x, want % x", b, compact)
	}
	got = wire.Request{}
	if err := got.DecodeExtended(&extended); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("extended request (-want +got):\n%s", diff)
	}
	if b := want.AppendExtended(nil); !bytes.Equal(b, extended[:]) {
		t.Errorf("extended request % x, want % x", b, extended)
	}
	compact[0] ^= 1
	extended[3] ^= 1
	if err := got.Decode(&compact); err == nil {
		t.Errorf("wrong magic gave %+v", got)
	}
	if err := got.DecodeExtended(&extended); err == nil {
		t.Errorf("wrong magic gave %+v", got)
	}
}

// TestDecodeWide holds that a length beyond 32 bits survives where there is room for it.
func TestDecodeWide(t *testing.T) {
	want := wire.Request{Command: wire.CmdTrim, Cookie: 9, Offset: 1 << 40, Length: 1<<63 + 1}
	sent := (*[wire.ExtendedRequestSize]byte)(want.AppendExtended(nil))
	var got wire.Request
	if err := got.DecodeExtended(sent); err != nil || got != want {
		t.Errorf("request %+v, error %v, want %+v", got, err, want)
	}
}

func TestChanges(t *testing.T) {
	for c := range wire.Command(10) {
		want := c == wire.CmdWrite || c == wire.CmdTrim || c == wire.CmdWriteZeroes
		for length := range uint64(2) {
			if r := (wire.Request{Command: c, Length: length}); r.Changes() != (want && length > 0) {
				t.Errorf("%v of %d bytes changes something: %v", c, length, r.Changes())
			}
		}
	}
}

func TestCommandString(t *testing.T) {
	for c, want := range map[wire.Command]string{
		0: "read", 1: "write", 2: "disconnect", 3: "flush", 4: "trim", 5: "cache", 6: "write zeroes", 7: "block status",
		8: "command 8", 65535: "command 65535",
	} {
		if got := c.String(); got != want {
			t.Errorf("Command(%d) = %q, want %q", uint16(c), got, want)
		}
	}
}

// FuzzRequest holds that what is decoded is all that was sent: encoding it again gives the same
// bytes.
func FuzzRequest(f *testing.F) {
	f.Add((&wire.Request{Command: wire.CmdRead, Cookie: 1, Length: 4096}).Append(nil))
	largest := wire.Request{
		Flags:   0xffff,
		Command: 0xffff,
		Cookie:  1<<64 - 1,
		Offset:  1<<64 - 1,
		Length:  1<<64 - 1,
	}
	f.Add(largest.AppendExtended(nil))
	f.Add(make([]byte, wire.RequestSize))
	f.Fuzz(func(t *testing.T, b []byte) {
		var r wire.Request
		if len(b) >= wire.RequestSize && r.Decode((*[wire.RequestSize]byte)(b)) == nil {
			if again := r.Append(nil); !bytes.Equal(again, b[:wire.RequestSize]) {
				t.Errorf("% x became % x", b, again)
			}
		} else if bytes.HasPrefix(b, []byte{0x25, 0x60, 0x95, 0x13}) && len(b) >= wire.RequestSize {
			t.Errorf("right magic, yet refused: % x", b)
		}
		if len(b) >= wire.ExtendedRequestSize && r.DecodeExtended((*[wire.ExtendedRequestSize]byte)(b)) == nil {
			if again := r.AppendExtended(nil); !bytes.Equal(again, b[:wire.ExtendedRequestSize]) {
				t.Errorf("% x became % x", b, again)
			}
		}
	})
}

func BenchmarkDecodeRequest(b *testing.B) {
	var r wire.Request
	bytes := [wire.RequestSize]byte((&wire.Request{Cookie: 1, Offset: 1 << 30, Length: 4096}).Append(nil))
	for b.Loop() {
		if err := r.Decode(&bytes); err != nil {
			b.Fatal(err)
		}
	}
}

// TestPayload holds what follows a request.
func TestPayload(t *testing.T) {
	for _, tt := range []struct {
		r                 wire.Request
		compact, extended uint64
	}{
		{wire.Request{Command: wire.CmdWrite, Length: 5}, 5, 5},
		{wire.Request{Command: wire.CmdWrite, Length: 5, Flags: wire.CmdFlagPayloadLen}, 5, 5},
		{wire.Request{Command: wire.CmdRead, Length: 5, Flags: wire.CmdFlagFUA}, 0, 0},
		{wire.Request{Command: wire.CmdRead, Length: 1<<64 - 1, Flags: wire.CmdFlagPayloadLen}, 0, 1<<64 - 1},
	} {
		if c, e := tt.r.Payload(false), tt.r.Payload(true); c != tt.compact || e != tt.extended {
			t.Errorf("%+v: %d with a compact header, %d with an extended one", tt.r, c, e)
		}
	}
}
