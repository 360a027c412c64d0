package wire_test

import (
	"bytes"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/server/wire"
)

func TestGreeting(t *testing.T) {
	want := "NBDMAGICIHAVEOPT\x00\x03"
	if got := string(wire.AppendGreeting(nil, wire.FlagFixedNewstyle|wire.FlagNoZeroes)); got != want {
		t.Errorf("greeting %q, want %q", got, want)
	}
	if f, err := wire.DecodeGreeting((*[wire.GreetingSize]byte)([]byte(want))); err != nil || f != 3 {
		t.Errorf("flags %d, error %v", f, err)
	}
	const oldstyle = "NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53\x00\x00"
	for _, said := range []string{oldstyle, "SSH-2.0-OpenSSH_9.2"} {
		if f, err := wire.DecodeGreeting((*[wire.GreetingSize]byte)([]byte(said))); err == nil {
			t.Errorf("%q gave flags %d", said, f)
		}
	}
	if got := string(wire.AppendClientFlags(nil, wire.FlagNoZeroes)); got != "\x00\x00\x00\x02" {
		t.Errorf("client flags %q", got)
	}
	if f := wire.DecodeClientFlags(&[4]byte{0x80, 0, 0, 1}); f != 1<<31|wire.FlagFixedNewstyle {
		t.Errorf("client flags %#x", uint32(f))
	}
}

func TestOption(t *testing.T) {
	want := "IHAVEOPT\x00\x00\x00\x07\x00\x00\x00\x04data"
	if got := string(wire.AppendOption(nil, wire.OptGo, []byte("data"))); got != want {
		t.Errorf("option %q, want %q", got, want)
	}
	var h wire.OptionHeader
	if err := h.Decode((*[wire.OptionSize]byte)([]byte(want))); err != nil ||
		h != (wire.OptionHeader{Option: wire.OptGo, Length: 4}) {
		t.Errorf("option %+v, error %v", h, err)
	}
	want = "\x00\x03\xe8\x89\x04\x55\x65\xa9\x00\x00\x00\x03\x80\x00\x00\x06\x00\x00\x00\x02no"
	if got := string(wire.AppendOptionReply(nil, wire.OptList, wire.RepErrUnknown, []byte("no"))); got != want {
		t.Errorf("reply %q, want %q", got, want)
	}
	var r wire.OptionReplyHeader
	if err := r.Decode((*[wire.OptionReplySize]byte)([]byte(want))); err != nil ||
		r != (wire.OptionReplyHeader{Option: wire.OptList, Type: wire.RepErrUnknown, Length: 2}) {
		t.Errorf("reply %+v, error %v", r, err)
	}
	if !r.Type.IsError() || wire.RepAck.IsError() {
		t.Error("errors are not told from the others")
	}
	if err := h.Decode(&[wire.OptionSize]byte{}); err == nil {
		t.Errorf("zeroes gave %+v", h)
	}
	if err := r.Decode(&[wire.OptionReplySize]byte{}); err == nil {
		t.Errorf("zeroes gave %+v", r)
	}
}

func TestInfo(t *testing.T) {
	data := "\x00\x00\x00\x04disk\x00\x02\x00\x03\x00\x01"
	asked := wire.InfoRequest{Name: "disk", Infos: []wire.Info{wire.InfoBlockSize, wire.InfoName}}
	if got := string(asked.Append(nil)); got != data {
		t.Errorf("data %q, want %q", got, data)
	}
	got, ok := wire.ParseInfoRequest([]byte(data))
	if diff := cmp.Diff(asked, got); !ok || diff != "" {
		t.Errorf("request %v (-want +got):\n%s", ok, diff)
	}
	if !got.Asks(wire.InfoBlockSize) || got.Asks(wire.InfoDescription) {
		t.Error("what is asked for is not known")
	}
	for _, bad := range []string{
		"",
		"\x00\x00\x00",
		"\x00\x00\x00\x04dis",
		"\x00\x00\x00\x04disk",
		"\x00\x00\x00\x04disk\x00",
		"\xff\xff\xff\xffdisk\x00\x00",
		data[:len(data)-1],
		data + "\x00",
	} {
		if got, ok := wire.ParseInfoRequest([]byte(bad)); ok {
			t.Errorf("%q gave %+v", bad, got)
		}
	}
	for _, tt := range []struct {
		got  []byte
		want string
	}{
		{wire.AppendInfoExport(nil, 1<<33, wire.FlagHasFlags|wire.FlagCanMultiConn),
			"\x00\x00\x00\x00\x00\x02\x00\x00\x00\x00\x01\x01"},
		{wire.AppendInfoBlockSize(nil, wire.BlockSizes{Minimum: 512, Preferred: 4096, Maximum: 32 << 20}),
			"\x00\x03\x00\x00\x02\x00\x00\x00\x10\x00\x02\x00\x00\x00"},
		{wire.AppendServer(nil, "disk", ""), "\x00\x00\x00\x04disk"},
		{wire.AppendExportName(nil, 512, wire.FlagHasFlags, true), "\x00\x00\x00\x00\x00\x00\x02\x00\x00\x01"},
		{wire.AppendExportName(nil, 512, wire.FlagHasFlags, false)[:12],
			"\x00\x00\x00\x00\x00\x00\x02\x00\x00\x01\x00\x00"},
	} {
		if string(tt.got) != tt.want {
			t.Errorf("%q, want %q", tt.got, tt.want)
		}
	}
	for _, no := range []bool{true, false} {
		if n := len(wire.AppendExportName(nil, 512, 0, no)); n != wire.ExportNameSize(no) {
			t.Errorf("an answer of %d bytes, want %d", n, wire.ExportNameSize(no))
		}
	}
}

// FuzzParse has a peer send any data of any option or reply. What is understood is encoded as it
// was.
func FuzzParse(f *testing.F) {
	f.Add((&wire.InfoRequest{Name: "disk", Infos: []wire.Info{0, 3}}).Append(nil))
	f.Add(wire.AppendInfoExport(nil, 1<<40, 0x1ff))
	f.Add(wire.AppendInfoBlockSize(nil, wire.BlockSizes{Minimum: 1, Preferred: 2, Maximum: 3}))
	f.Add(wire.AppendServer(nil, "disk", ""))
	f.Add((&wire.MetaRequest{Name: "disk", Queries: []string{wire.ContextAllocation}}).Append(nil))
	f.Add([]byte("\xff\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if r, ok := wire.ParseInfoRequest(data); ok && !bytes.Equal(r.Append(nil), data) {
			t.Errorf("% x became % x", data, r.Append(nil))
		}
		if name, details, ok := wire.ParseServer(data); ok &&
			!bytes.Equal(wire.AppendServer(nil, name, details), data) {
			t.Errorf("% x became %q and %q", data, name, details)
		}
		if r, ok := wire.ParseMetaRequest(data); ok && !bytes.Equal(r.Append(nil), data) {
			t.Errorf("% x became % x", data, r.Append(nil))
		}
		kind, rest, ok := wire.ParseInfo(data)
		if !ok {
			return
		}
		if size, flags, ok := wire.ParseExport(rest); ok && kind == wire.InfoExport &&
			!bytes.Equal(wire.AppendInfoExport(nil, size, flags), data) {
			t.Errorf("% x became size %d and flags %v", data, size, flags)
		}
		if s, ok := wire.ParseBlockSizes(rest); ok && kind == wire.InfoBlockSize &&
			!bytes.Equal(wire.AppendInfoBlockSize(nil, s), data) {
			t.Errorf("% x became %+v", data, s)
		}
	})
}
