package server

import (
	"bytes"
	"io"
	"math"
	"testing"

	"github.com/nbdctl/nbdctl/backends"
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
		h      header
		want   *refusal
	}{
		{"read", full, header{op: OpRead, length: 512}, nil},
		{"read all", full, header{op: OpRead, length: size}, nil},
		{"read last block", full, header{op: OpRead, offset: size - 512, length: 512}, nil},
		{"read nothing at the end", full, header{op: OpRead, offset: size}, nil},
		{"read beyond", full, header{op: OpRead, offset: size - 512, length: 1024}, errPastEnd},
		{"read behind", full, header{op: OpRead, offset: size + 512, length: 512}, errPastEnd},
		{"read nothing behind", full, header{op: OpRead, offset: size + 512}, errPastEnd},
		{"sum wraps around", full, header{op: OpRead, offset: math.MaxUint64 - 511, length: 1024}, errPastEnd},
		{"sum wraps around the sign", full, header{op: OpRead, offset: math.MaxInt64 - 511, length: 512}, errPastEnd},
		{"read with FUA", full, header{op: OpRead, flags: flagFUA, length: 512}, nil},
		{"read with no-hole", full, header{op: OpRead, flags: flagNoHole, length: 512}, errUnknownFlag},
		{"read with DF", full, header{op: OpRead, flags: 4, length: 512}, errUnknownFlag},
		{"read just too long", full, header{op: OpRead, length: maxPayload + 512}, errTooLong},
		{"read up to the backend's maximum", limited, header{op: OpRead, length: 64 << 10}, nil},
		{"read beyond the backend's maximum", limited, header{op: OpRead, length: 64<<10 + 512}, errTooLong},
		{"write beyond the backend's maximum", limited, header{op: OpWrite, length: 64<<10 + 512}, errTooLong},
		{"zero beyond the backend's maximum", limited, header{op: OpWriteZeroes, length: size}, nil},
		{"read below the backend's minimum", limited, header{op: OpRead, length: 256}, errUnaligned},
		{"read at odd offset", full, header{op: OpRead, offset: 1, length: 512}, errUnaligned},
		{"read of odd length", full, header{op: OpRead, length: 511}, errUnaligned},
		{"write beyond", full, header{op: OpWrite, offset: size, length: 512}, errNoRoom},
		{"write with fast-zero", full, header{op: OpWrite, flags: 16, length: 512}, errUnknownFlag},
		{"write to read-only", readOnly, header{op: OpWrite, length: 512}, errReadOnly},
		{"write beyond read-only", readOnly, header{op: OpWrite, offset: size, length: 512}, errReadOnly},
		{"trim", full, header{op: OpTrim, length: size}, nil},
		{"trim beyond", full, header{op: OpTrim, offset: 512, length: size}, errPastEnd},
		{"trim of 4 GiB", full, header{op: OpTrim, length: math.MaxUint32 - 511}, errPastEnd},
		{"trim of read-only", readOnly, header{op: OpTrim, length: 512}, errReadOnly},
		{"trim not offered", noTrim, header{op: OpTrim, length: 512}, errNotOffered},
		{"zero", full, header{op: OpWriteZeroes, flags: flagFUA | flagNoHole, length: size}, nil},
		{"zero without a Zeroer", noTrim, header{op: OpWriteZeroes, length: size}, nil},
		{"zero beyond", full, header{op: OpWriteZeroes, offset: 512, length: size}, errNoRoom},
		{"zero fast", full, header{op: OpWriteZeroes, flags: 16, length: 512}, errUnknownFlag},
		{"zero of read-only", readOnly, header{op: OpWriteZeroes, length: 512}, errReadOnly},
		{"flush", full, header{op: OpFlush, flags: flagFUA}, nil},
		{"flush of read-only", readOnly, header{op: OpFlush}, nil},
		{"flush of a range", full, header{op: OpFlush, length: 512}, errFlushRange},
		{"cache", full, header{op: 5, length: 512}, errUnknownOp},
		{"block status", full, header{op: 7, length: 512}, errUnknownOp},
		{"nonsense", full, header{op: 0xffff, flags: 0xffff, offset: 1, length: 1}, errUnknownOp},
	}
	for _, tt := range tests {
		if got := tt.export.check(tt.h); got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
}

func BenchmarkCheck(b *testing.B) {
	e, err := NewExport(bytes.NewReader(make([]byte, 1<<20)), Options{BlockSize: 512})
	if err != nil {
		b.Fatal(err)
	}
	h := header{op: OpRead, offset: 1 << 19, length: 4096}
	for b.Loop() {
		if err := e.check(h); err != nil {
			b.Fatal(err)
		}
	}
}
