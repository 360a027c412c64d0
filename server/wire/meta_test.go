package wire

import (
	"bytes"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestMetaRequest(t *testing.T) {
	for _, r := range []MetaRequest{
		{Queries: []string{}},
		{Name: "disk", Queries: []string{ContextAllocation}},
		{Name: "ä", Queries: []string{"", "qemu:dirty-bitmap:b", strings.Repeat("x", MaxString)}},
	} {
		got, ok := ParseMetaRequest(r.Append(nil))
		if diff := cmp.Diff(r, got); diff != "" || !ok {
			t.Errorf("%t (-want +got):\n%s", ok, diff)
		}
	}
	if got := string((&MetaRequest{Name: "x", Queries: []string{"ab"}}).Append(nil)); got !=
		"\x00\x00\x00\x01x\x00\x00\x00\x01\x00\x00\x00\x02ab" {
		t.Errorf("%q", got)
	}
	for _, malformed := range []string{
		"", "\x00\x00\x00", "\x00\x00\x00\x01x", "\x00\x00\x00\x01x\x00\x00\x00\x01",
		"\x00\x00\x00\x00\x00\x00\x00\x00x",
		"\x00\x00\x00\x00\xff\xff\xff\xff\x00\x00\x00\x00", "\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x02a",
	} {
		if got, ok := ParseMetaRequest([]byte(malformed)); ok {
			t.Errorf("%q: %+v", malformed, got)
		}
	}
	if id, name, ok := ParseMetaContext(AppendMetaContext(nil, 7, "a:b")); id != 7 || name != "a:b" || !ok {
		t.Errorf("%d, %q, %t", id, name, ok)
	}
	if _, _, ok := ParseMetaContext([]byte("abc")); ok {
		t.Error("a context of three bytes")
	}
}

func TestChunkPayloads(t *testing.T) {
	if got := AppendHole(nil, 1<<40, 512); !bytes.Equal(got, []byte("\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x02\x00")) {
		t.Errorf("hole: %q", got)
	}
	if off, n, ok := ParseHole(AppendHole(nil, 1<<40, 512)); off != 1<<40 || n != 512 || !ok {
		t.Errorf("hole: %d, %d, %t", off, n, ok)
	}
	if _, _, ok := ParseHole(make([]byte, HoleSize+1)); ok {
		t.Error("a hole that is too long")
	}
	if got := AppendOffset(nil, 1<<40); len(got) != ChunkOffsetSize || got[2] != 1 {
		t.Errorf("offset: %q", got)
	}
	b := AppendStatus(AppendStatus(AppendContextID(nil, 5), 4096, StateHole|StateZero), 1<<32-1, 0)
	id, extents, ok := ParseStatus(b)
	if !ok || id != 5 || len(extents) != 2*StatusSize {
		t.Fatalf("status: %d, %q, %t", id, extents, ok)
	}
	if n, flags := DecodeStatus((*[StatusSize]byte)(extents)); n != 4096 || flags != 3 {
		t.Errorf("status: %d, %d", n, flags)
	}
	if n, flags := DecodeStatus((*[StatusSize]byte)(extents[StatusSize:])); n != 1<<32-1 || flags != 0 {
		t.Errorf("status: %d, %d", n, flags)
	}
	length, ids, ok := ParseStatusChoice(AppendStatusChoice(nil, 1<<40, 7, 1<<31))
	if length != 1<<40 || len(ids) != 2 || ids[0] != 7 || ids[1] != 1<<31 || !ok {
		t.Errorf("choice: %d, %d, %t", length, ids, ok)
	}
	for _, n := range []int{0, 4, 9, 15} {
		if _, _, ok := ParseStatusChoice(make([]byte, n)); ok {
			t.Errorf("a choice of %d bytes", n)
		}
	}
	wide := AppendStatusExt(AppendStatusExt(AppendStatusExtHead(nil, 6), 1<<40, 3), 1<<63, 1<<33)
	if _, _, ok := ParseStatusExt(wide); !ok {
		t.Error("a status that does not say how many extents it has")
	}
	EndStatusExt(wide)
	if id, extents, ok := ParseStatusExt(wide); !ok || id != 6 || len(extents) != 2*StatusExtSize || wide[7] != 2 {
		t.Errorf("extended status: %d, %q, %t", id, extents, ok)
	} else if n, f := DecodeStatusExt((*[StatusExtSize]byte)(extents[StatusExtSize:])); n != 1<<63 || f != 1<<33 {
		t.Errorf("extended status: %d, %d", n, f)
	}
	for _, n := range []int{0, 8, 23, 24, 25} { // of which 24 has one extent of two
		if _, _, ok := ParseStatusExt(wide[:n]); ok {
			t.Errorf("an extended status of %d bytes", n)
		}
	}
	for _, n := range []int{0, 4, 8, 11, 13} {
		if _, _, ok := ParseStatus(b[:n]); ok {
			t.Errorf("a status of %d bytes", n)
		}
	}
	long := strings.Repeat("x", MaxErrorText+1)
	e, text, rest, ok := ParseError(append(AppendError(nil, ErrnoIO, long), "rest"...))
	if e != ErrnoIO || text != long[:MaxErrorText] || string(rest) != "rest" || !ok {
		t.Errorf("error: %d, %q, %q, %t", e, text, rest, ok)
	}
	_, _, rest, _ = ParseError(AppendErrorOffset(nil, ErrnoIO, "x", 1<<40))
	if off, ok := ParseErrorOffset(rest); off != 1<<40 || !ok {
		t.Errorf("error at %d, %t", off, ok)
	}
	if _, ok := ParseErrorOffset(rest[1:]); ok {
		t.Error("an offset of 7 bytes")
	}
	for _, malformed := range []string{"", "\x00\x00\x00\x05\x00", "\x00\x00\x00\x05\x00\x02x"} {
		if _, _, _, ok := ParseError([]byte(malformed)); ok {
			t.Errorf("error of %q", malformed)
		}
	}
}
