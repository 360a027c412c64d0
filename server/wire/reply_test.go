package wire_test

import (
	"bytes"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/server/wire"
)

func TestSimpleReply(t *testing.T) {
	want := [wire.SimpleReplySize]byte{0x67, 0x44, 0x66, 0x98, 0, 0, 0, 28, 1, 2, 3, 4, 5, 6, 7, 8}
	got := [wire.SimpleReplySize]byte{15: 0xff}
	reply := wire.SimpleReply{Errno: wire.ErrnoNoSpace, Cookie: 0x0102030405060708}
	reply.Put(&got)
	if got != want {
		t.Errorf("reply % x, want % x", got, want)
	}
	var back wire.SimpleReply
	if err := back.Decode(&want); err != nil || back != reply {
		t.Errorf("reply %+v, error %v, want %+v", back, err, reply)
	}
	want[3] ^= 1
	if err := back.Decode(&want); err == nil {
		t.Errorf("wrong magic gave %+v", back)
	}
}

func TestChunk(t *testing.T) {
	chunk := wire.Chunk{
		Flags:  wire.ChunkDone,
		Type:   wire.ChunkErrorOffset,
		Cookie: 0x0102030405060708,
		Length: 0x01020304,
	}
	want := []byte{
		0x66, 0x8e, 0x33, 0xef, // magic
		0x00, 0x01, // flags
		0x80, 0x02, // type
		1, 2, 3, 4, 5, 6, 7, 8, // cookie
		1, 2, 3, 4, // length
	}
	if got := chunk.Append(nil); !bytes.Equal(got, want) {
		t.Errorf("chunk % x, want % x", got, want)
	}
	var back wire.Chunk
	if err := back.Decode((*[wire.ChunkSize]byte)(want)); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(chunk, back); diff != "" {
		t.Errorf("chunk (-want +got):\n%s", diff)
	}
	chunk.Offset, chunk.Length = 1<<40, 1<<33
	want = []byte{
		0x6e, 0x8a, 0x27, 0x8c,
		0x00, 0x01,
		0x80, 0x02,
		1, 2, 3, 4, 5, 6, 7, 8,
		0, 0, 1, 0, 0, 0, 0, 0, // offset
		0, 0, 0, 2, 0, 0, 0, 0, // length
	}
	if got := chunk.AppendExtended(nil); !bytes.Equal(got, want) {
		t.Errorf("extended chunk % x, want % x", got, want)
	}
	if err := back.DecodeExtended((*[wire.ExtendedChunkSize]byte)(want)); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(chunk, back); diff != "" {
		t.Errorf("extended chunk (-want +got):\n%s", diff)
	}
	if err := back.Decode((*[wire.ChunkSize]byte)(want)); err == nil {
		t.Errorf("another magic gave %+v", back)
	}
	for kind, want := range map[wire.ChunkType]bool{
		wire.ChunkNone: false, wire.ChunkBlockStatusExt: false, wire.ChunkError: true, 1<<15 + 99: true,
	} {
		if got := kind.IsError(); got != want {
			t.Errorf("type %d is an error: %v, want %v", kind, got, want)
		}
	}
}

// FuzzReply holds that what is decoded is all that was sent.
func FuzzReply(f *testing.F) {
	var b [wire.SimpleReplySize]byte
	wire.SimpleReply{Errno: wire.ErrnoIO, Cookie: 1<<64 - 1}.Put(&b)
	f.Add(b[:])
	f.Add((&wire.Chunk{Type: wire.ChunkOffsetData, Cookie: 2, Length: 4096}).Append(nil))
	f.Add((&wire.Chunk{Type: wire.ChunkNone, Flags: wire.ChunkDone, Cookie: 3, Offset: 5}).AppendExtended(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		var s wire.SimpleReply
		if len(b) >= wire.SimpleReplySize && s.Decode((*[wire.SimpleReplySize]byte)(b)) == nil {
			var again [wire.SimpleReplySize]byte
			s.Put(&again)
			if !bytes.HasPrefix(b, again[:]) {
				t.Errorf("% x became % x", b, again)
			}
		}
		var c wire.Chunk
		if len(b) >= wire.ChunkSize && c.Decode((*[wire.ChunkSize]byte)(b)) == nil &&
			!bytes.HasPrefix(b, c.Append(nil)) {
			t.Errorf("% x became % x", b, c.Append(nil))
		}
		if len(b) >= wire.ExtendedChunkSize && c.DecodeExtended((*[wire.ExtendedChunkSize]byte)(b)) == nil &&
			!bytes.HasPrefix(b, c.AppendExtended(nil)) {
			t.Errorf("% x became % x", b, c.AppendExtended(nil))
		}
	})
}

func BenchmarkPutSimpleReply(b *testing.B) {
	var bytes [wire.SimpleReplySize]byte
	for b.Loop() {
		wire.SimpleReply{Cookie: 1}.Put(&bytes)
	}
}
