package blockdev_test

import (
	"bytes"
	"os"
	"syscall"
	"testing"

	"github.com/nbdctl/nbdctl/backends/memory"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// TestKernelLongDiscard discards 3 TiB in the middle of a device of 4 TiB, which the kernel cuts
// into requests of less than 4 GiB: all that is inside is zeros afterwards, and nothing else has
// changed.
func TestKernelLongDiscard(t *testing.T) {
	nbdnltest.RequireKernel(t)
	const size, from, to, mark = 4 << 40, 512 << 30, 3584 << 30, 64 << 10
	m, err := memory.New(size, memory.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	d := connect(t, m, blockdev.Options{})
	f := open(t, d, os.O_RDWR|syscall.O_DIRECT)
	p := aligned(t, mark)
	// At the ends, and on both sides of where a request of 4 GiB and one of 32 bits of bytes would
	// end.
	offsets := []int64{
		0, from - mark, from, from + 1<<32 - 2*mark, from + 1<<32 - mark, from + 1<<32,
		2 << 40, 2<<40 + 1<<32, to - mark, to, size - mark,
	}
	pattern := func(off int64) []byte { return bytes.Repeat([]byte{byte(1 + off/mark%251)}, mark) }
	for _, off := range offsets {
		copy(p, pattern(off))
		if _, err := f.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	if err := discard(f, from, to-from); err != nil {
		t.Fatal(err)
	}
	for _, off := range offsets {
		want := pattern(off)
		if off >= from && off < to {
			want = make([]byte, mark)
		}
		if _, err := f.ReadAt(p, off); err != nil || !bytes.Equal(p, want) {
			t.Errorf("64 KiB at %d begin with %d, want %d (%v)", off, p[0], want[0], err)
		}
	}
	trims := d.Export().Stats().Trim
	if trims.Bytes != to-from || trims.Errors != 0 {
		t.Errorf("%d bytes were trimmed in %d requests, %d failed; want %d bytes",
			trims.Bytes, trims.Requests, trims.Errors, int64(to-from))
	}
	t.Logf("%d requests", trims.Requests)
	f.Close()
}
