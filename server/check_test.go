package server

import (
	"bytes"
	"io"
	"math"
	"testing"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/server/wire"
)

// writable is a backend that takes everything, for tests that never execute a request.
type writable struct {
	*bytes.Reader
	io.WriterAt
}

func (writable) Trim(off, n int64) error                           { return nil }
func (writable) Zero(off, n int64, flags backends.ZeroFlags) error { return nil }

// upTo64k also limits the size of requests.
type upTo64k struct{ writable }

func (upTo64k) BlockSizes() backends.BlockSizes {
	return backends.BlockSizes{Minimum: 512, Maximum: 64 << 10}
}

func TestCheck(t *testing.T) {
	const size = 1 << 20
	reader := bytes.NewReader(make([]byte, size))
	full, err := NewExport(writable{Reader: reader}, Options{BlockSize: 512})
	if err != nil {
		t.Fatal(err)
	}
	readOnly, err := NewExport(reader, Options{BlockSize: 512})
	if err != nil {
		t.Fatal(err)
	}
	noTrim, err := NewExport(struct {
		backends.Backend
		io.WriterAt
	}{Backend: reader}, Options{BlockSize: 512})
	if err != nil {
		t.Fatal(err)
	}
	limited, err := NewExport(upTo64k{writable{Reader: reader}}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name   string
		export *Export
		h      wire.Request
		want   *refusal
	}{
		{"read", full, wire.Request{Command: wire.CmdRead, Length: 512}, nil},
		{"read all", full, wire.Request{Command: wire.CmdRead, Length: size}, nil},
		{"read last block", full, wire.Request{Command: wire.CmdRead, Offset: size - 512, Length: 512}, nil},
		{"read nothing at the end", full, wire.Request{Command: wire.CmdRead, Offset: size}, nil},
		{"read beyond", full, wire.Request{Command: wire.CmdRead, Offset: size - 512, Length: 1024}, errPastEnd},
		{"read behind", full, wire.Request{Command: wire.CmdRead, Offset: size + 512, Length: 512}, errPastEnd},
		{"read nothing behind", full, wire.Request{Command: wire.CmdRead, Offset: size + 512}, errPastEnd},
		{"sum wraps around", full, wire.Request{Command: wire.CmdRead, Offset: math.MaxUint64 - 511, Length: 1024},
			errPastEnd},
		{"sum wraps around the sign", full,
			wire.Request{Command: wire.CmdRead, Offset: math.MaxInt64 - 511, Length: 512}, errPastEnd},
		{"read with FUA", full, wire.Request{Command: wire.CmdRead, Flags: wire.CmdFlagFUA, Length: 512}, nil},
		{"read with no-hole", full, wire.Request{Command: wire.CmdRead, Flags: wire.CmdFlagNoHole, Length: 512},
			errUnknownFlag},
		{"read with DF", full, wire.Request{Command: wire.CmdRead, Flags: 4, Length: 512}, errUnknownFlag},
		{"read just too long", full, wire.Request{Command: wire.CmdRead, Length: wire.MaxPayload + 512}, errTooLong},
		{"read up to the backend's maximum", limited, wire.Request{Command: wire.CmdRead, Length: 64 << 10}, nil},
		{"read beyond the backend's maximum", limited, wire.Request{Command: wire.CmdRead, Length: 64<<10 + 512},
			errTooLong},
		{"write beyond the backend's maximum", limited, wire.Request{Command: wire.CmdWrite, Length: 64<<10 + 512},
			errTooLong},
		{"zero beyond the backend's maximum", limited, wire.Request{Command: wire.CmdWriteZeroes, Length: size}, nil},
		{"read below the backend's minimum", limited, wire.Request{Command: wire.CmdRead, Length: 256}, errUnaligned},
		{"read at odd offset", full, wire.Request{Command: wire.CmdRead, Offset: 1, Length: 512}, errUnaligned},
		{"read of odd length", full, wire.Request{Command: wire.CmdRead, Length: 511}, errUnaligned},
		{"write beyond", full, wire.Request{Command: wire.CmdWrite, Offset: size, Length: 512}, errNoRoom},
		{"write with fast-zero", full, wire.Request{Command: wire.CmdWrite, Flags: 16, Length: 512}, errUnknownFlag},
		{"write to read-only", readOnly, wire.Request{Command: wire.CmdWrite, Length: 512}, errReadOnly},
		{"write beyond read-only", readOnly, wire.Request{Command: wire.CmdWrite, Offset: size, Length: 512},
			errReadOnly},
		{"trim", full, wire.Request{Command: wire.CmdTrim, Length: size}, nil},
		{"trim beyond", full, wire.Request{Command: wire.CmdTrim, Offset: 512, Length: size}, errPastEnd},
		{"trim of 4 GiB", full, wire.Request{Command: wire.CmdTrim, Length: math.MaxUint32 - 511}, errPastEnd},
		{"trim of read-only", readOnly, wire.Request{Command: wire.CmdTrim, Length: 512}, errReadOnly},
		{"trim not offered", noTrim, wire.Request{Command: wire.CmdTrim, Length: 512}, errNotOffered},
		{"zero", full, wire.Request{Command: wire.CmdWriteZeroes, Flags: wire.CmdFlagFUA | wire.CmdFlagNoHole,
			Length: size}, nil},
		{"zero without a Zeroer", noTrim, wire.Request{Command: wire.CmdWriteZeroes, Length: size}, nil},
		{"zero beyond", full, wire.Request{Command: wire.CmdWriteZeroes, Offset: 512, Length: size}, errNoRoom},
		{"zero fast", full, wire.Request{Command: wire.CmdWriteZeroes, Flags: 16, Length: 512}, nil},
		{"cache, not offered", full, wire.Request{Command: wire.CmdCache, Length: 512}, errNoCache},
		{"zero of read-only", readOnly, wire.Request{Command: wire.CmdWriteZeroes, Length: 512}, errReadOnly},
		{"flush", full, wire.Request{Command: wire.CmdFlush, Flags: wire.CmdFlagFUA}, nil},
		{"flush of read-only", readOnly, wire.Request{Command: wire.CmdFlush}, nil},
		{"flush of a range", full, wire.Request{Command: wire.CmdFlush, Length: 512}, errFlushRange},
		{"block status", full, wire.Request{Command: wire.CmdBlockStatus, Length: 512}, nil},
		{"block status of read-only", readOnly, wire.Request{Command: wire.CmdBlockStatus, Length: size}, nil},
		{"block status of nothing", full, wire.Request{Command: wire.CmdBlockStatus, Offset: 512}, errNothing},
		{"block status past the end", full, wire.Request{Command: wire.CmdBlockStatus, Length: size + 512}, errPastEnd},
		{"nonsense", full, wire.Request{Command: 0xffff, Flags: 0xffff, Offset: 1, Length: 1}, errUnknownOp},
	}
	for _, tt := range tests {
		if got := tt.export.check(tt.h, &Agreement{Contexts: make([]Context, 1)}); got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
}

func BenchmarkCheck(b *testing.B) {
	e, err := NewExport(bytes.NewReader(make([]byte, 1<<20)), Options{BlockSize: 512})
	if err != nil {
		b.Fatal(err)
	}
	h := wire.Request{Command: wire.CmdRead, Offset: 1 << 19, Length: 4096}
	for b.Loop() {
		if err := e.check(h, &Agreement{Contexts: make([]Context, 1)}); err != nil {
			b.Fatal(err)
		}
	}
}
