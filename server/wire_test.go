package server

import (
	"bytes"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestDecodeHeader(t *testing.T) {
	wire := [headerSize]byte{
		0x25, 0x60, 0x95, 0x13, // magic
		0x00, 0x01, // flags: FUA
		0x00, 0x06, // type: WRITE_ZEROES
		1, 2, 3, 4, 5, 6, 7, 8, // cookie
		0, 0, 0, 1, 0, 0, 0x10, 0x00, // offset
		0xff, 0xff, 0xfe, 0x00, // length
	}
	want := header{
		flags: flagFUA, op: OpWriteZeroes, cookie: 0x0102030405060708, offset: 1<<32 + 4096, length: 0xfffffe00,
	}
	var got header
	err := got.decode(&wire)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(header{})); diff != "" {
		t.Errorf("header (-want +got):\n%s", diff)
	}
	wire[0] ^= 1
	var h header
	if err := h.decode(&wire); err == nil {
		t.Errorf("wrong magic gave %+v", h)
	}
}

func TestPutReply(t *testing.T) {
	want := [replySize]byte{0x67, 0x44, 0x66, 0x98, 0, 0, 0, 28, 1, 2, 3, 4, 5, 6, 7, 8}
	got := [replySize]byte{15: 0xff}
	putReply(&got, errnoNoSpace, 0x0102030405060708)
	if got != want {
		t.Errorf("reply % x, want % x", got, want)
	}
}

func TestOpString(t *testing.T) {
	for op, want := range map[Op]string{
		OpRead: "read", OpWrite: "write", OpDisconnect: "disconnect", OpFlush: "flush", OpTrim: "trim",
		OpWriteZeroes: "write zeroes", 5: "command 5", 65535: "command 65535",
	} {
		if got := op.String(); got != want {
			t.Errorf("Op(%d) = %q, want %q", uint16(op), got, want)
		}
	}
}

// FuzzDecodeHeader holds that what is decoded is all that was sent: encoding it again gives the same bytes.
func FuzzDecodeHeader(f *testing.F) {
	f.Add(header{op: OpRead, cookie: 1, length: 4096}.appendTo(nil))
	f.Add(header{flags: 0xffff, op: 0xffff, cookie: 1<<64 - 1, offset: 1<<64 - 1, length: 1<<32 - 1}.appendTo(nil))
	f.Add(make([]byte, headerSize))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < headerSize {
			return
		}
		wire := [headerSize]byte(b)
		var h header
		err := h.decode(&wire)
		if err != nil {
			if bytes.HasPrefix(b, []byte{0x25, 0x60, 0x95, 0x13}) {
				t.Fatalf("right magic, yet %v", err)
			}
			return
		}
		if again := h.appendTo(nil); !bytes.Equal(again, wire[:]) {
			t.Fatalf("% x became % x", wire, again)
		}
	})
}

func BenchmarkDecodeHeader(b *testing.B) {
	var h header
	wire := [headerSize]byte(header{op: OpRead, cookie: 1, offset: 1 << 30, length: 4096}.appendTo(nil))
	for b.Loop() {
		if err := h.decode(&wire); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkPutReply(b *testing.B) {
	var wire [replySize]byte
	for b.Loop() {
		putReply(&wire, errnoNone, 1)
	}
}
