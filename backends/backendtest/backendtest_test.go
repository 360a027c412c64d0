package backendtest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nbdctl/nbdctl/backends"
)

const diskSize = 200_001

func TestRightBackends(t *testing.T) {
	content := fill((&subject{opts: Options{Seed: 1}}).worker(0), diskSize)
	file, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	file.Write(content)
	for name, open := range map[string]func() backends.Backend{
		"bytes.Reader":     func() backends.Backend { return bytes.NewReader(content) },
		"io.SectionReader": func() backends.Backend { return io.NewSectionReader(file, 100, diskSize-100) },
		"everything":       func() backends.Backend { return newDisk(diskSize) },
		"one byte":         func() backends.Backend { return newDisk(1) },
		"long":             func() backends.Backend { return newDisk(5 << 20) },
		"blocks":           func() backends.Backend { return &blocks{newDisk(512 << 10)} },
		"sends files":      func() backends.Backend { return &filed{bytes.NewReader(content), file} },
		"gives up":         func() backends.Backend { return newContextDisk(diskSize) },
	} {
		t.Run(name, func(t *testing.T) {
			opts := Options{Operations: 100, TrimZeroes: true}
			if _, ok := open().(stallable); ok {
				opts.Stall = func(_ testing.TB, b backends.Backend) func() { return b.(stallable).stall() }
			}
			if _, ok := open().(*disk); ok {
				opts.Reopen = func(_ testing.TB, b backends.Backend) backends.Backend { return b.(*disk).crash() }
			}
			Test(t, func(testing.TB) backends.Backend { return open() }, opts)
		})
	}
}

// blocks refuses what is no block.
type blocks struct{ *disk }

func (*blocks) BlockSizes() backends.BlockSizes {
	return backends.BlockSizes{Minimum: 4096, Preferred: 8192, Maximum: 12288}
}

func (b *blocks) ReadAt(p []byte, off int64) (int, error) {
	if off%4096 != 0 || len(p)%4096 != 0 || len(p) > 12288 {
		return 0, errWrong
	}
	return b.disk.ReadAt(p, off)
}

func (b *blocks) WriteAt(p []byte, off int64) (int, error) {
	if off%4096 != 0 || len(p)%4096 != 0 || len(p) > 12288 {
		return 0, errWrong
	}
	return b.disk.WriteAt(p, off)
}

func (b *blocks) Zero(off, n int64, flags backends.ZeroFlags) error {
	if off%4096 != 0 || n%4096 != 0 {
		return errWrong
	}
	if n%8192 != 0 {
		return errors.ErrUnsupported // let the caller do it
	}
	return b.disk.Zero(off, n, flags)
}

// filed answers from a file where the server can.
type filed struct {
	*bytes.Reader
	f *os.File
}

func (b *filed) ReadAtTo(w backends.Reply, off int64, n int) error {
	if w.File(b.f, off, n) {
		return nil
	}
	if p := w.Buffer(n); p != nil {
		_, err := b.f.ReadAt(p, off)
		return err
	}
	return backends.ErrWouldBlock
}

// Every rule of the contract has a backend that breaks it, and the kit has to see
// that.
func TestWrongBackends(t *testing.T) {
	crash := func(_ testing.TB, b backends.Backend) backends.Backend {
		switch b := b.(type) {
		case *syncsNothing:
			return &syncsNothing{b.crash()}
		case *fuaIsPlain:
			return &fuaIsPlain{b.crash()}
		case *shrinksOnReopen:
			d := b.crash()
			d.Resize(d.Size() - 1)
			return d
		}
		panic("unknown")
	}
	for _, tt := range []struct {
		wrong backends.Backend
		check string
		says  string
	}{
		{&grows{disk: newDisk(diskSize)}, "Promises", "Size: "},
		{&oddBlocks{newDisk(diskSize), backends.BlockSizes{Minimum: 3}}, "Promises", "powers of two"},
		{&oddBlocks{newDisk(diskSize), backends.BlockSizes{Minimum: 4096}}, "Promises", "no multiple of the smallest"},
		{&oddBlocks{newDisk(1 << 20), backends.BlockSizes{Minimum: 4096, Preferred: 512}}, "Promises", "below minimum"},
		{
			&oddBlocks{newDisk(1 << 20), backends.BlockSizes{Minimum: 4096, Maximum: 5000}},
			"Promises", "multiple of minimum",
		},
		{&fickle{disk: newDisk(diskSize)}, "Promises", "Probe: "},
		{&syncFails{newDisk(diskSize)}, "Promises", "Sync with nothing to do"},

		{&readsShort{newDisk(diskSize)}, "ReadEdges", "no error"},
		{&readsLess{newDisk(diskSize)}, "ReadEdges", "EOF"},
		{&readsTooMuch{newDisk(diskSize)}, "ReadEdges", "outside its buffer"},
		{&emptyFails{newDisk(diskSize)}, "ReadEdges", "of nothing"},
		{&noise{disk: newDisk(diskSize)}, "ReadEdges", "read twice"},
		{&oneBuffer{disk: newDisk(diskSize)}, "ConcurrentReads", "concurrent reads"},

		{&writesShort{newDisk(diskSize)}, "WriteEdges", "no error"},
		{&losesLastByte{newDisk(diskSize)}, "WriteEdges", "is 0x"},
		{&changesArgument{newDisk(diskSize)}, "WriteEdges", "changed its argument"},
		{&keepsArgument{disk: newDisk(diskSize)}, "WriteEdges", "is 0x"},
		{&wholePages{newDisk(200 << 10)}, "WriteEdges", "is 0x"},
		{&forgetsAlignment{newDisk(diskSize)}, "Random", "random"},
		{&pagesUnlocked{newDisk(200 << 10)}, "Neighbours", "is 0x"},

		{&zeroesNothing{newDisk(diskSize)}, "Zero", "Zero: byte"},
		{&zeroesUnsupported{newDisk(diskSize)}, "Zero", "Zero: byte"},
		{&zeroesWholePages{newDisk(200 << 10)}, "Zero", "Zero: byte"},
		{&zeroesInside{newDisk(200 << 10)}, "Zero", "Zero: byte"},
		{&zeroesFastByHalf{newDisk(diskSize)}, "Zero", "Zero: byte"},
		{&cacheFails{newDisk(diskSize)}, "Cache", errWrong.Error()},
		{&cacheForgets{newDisk(diskSize)}, "Cache", "Cache: byte"},
		{&trimsToGarbage{newDisk(diskSize)}, "Trim", "may be zero"},
		{&trimsWholePages{newDisk(200 << 10)}, "Trim", "is 0x"},
		{&extentsGap{newDisk(diskSize)}, "Extents", "is next"},
		{&extentsEarly{newDisk(diskSize)}, "Extents", "ends at"},
		{&extentsOutside{newDisk(diskSize)}, "Extents", "is next"},
		{&extentsLie{newDisk(diskSize)}, "Extents", "is 0x"},
		{&extentsDeaf{newDisk(diskSize)}, "Extents", "stopped at the first"},

		{&contextsNone{newDisk(diskSize)}, "Contexts", "Contexts: 0"},
		{&contextsWide{newDisk(diskSize)}, "Contexts", "not Wide"},
		{&contextsGap{newDisk(diskSize)}, "Contexts", "is next"},
		{&contextsEarly{newDisk(diskSize)}, "Contexts", "ends at"},

		{&repliesOther{newDisk(diskSize)}, "ReadTo", "ReadAtTo: byte"},
		{&repliesLess{newDisk(diskSize)}, "ReadTo", "gave"},
		{&repliesReused{disk: newDisk(diskSize)}, "ReadTo", "ReadAtTo: byte"},
		{&repliesWrapped{newDisk(diskSize)}, "ReadTo", "wrapped"},
		{&contextOther{newContextDisk(diskSize)}, "ReadContext", "other bytes than ReadAt"},
		{&contextShort{newContextDisk(diskSize)}, "ReadContext", "no error when"},
		{&contextDeaf{newContextDisk(diskSize)}, "ReadContext", "does not return"},
		{&contextLoses{newContextDisk(diskSize)}, "WriteContext", "WriteAtContext has written"},
		{&contextLate{contextDisk: newContextDisk(diskSize)}, "WriteContext", "after it was given up"},

		{&takesLess{newDisk(diskSize)}, "WriteFrom", "left"},
		{&takesMore{newDisk(diskSize)}, "WriteFrom", "asked for more"},
		{&takesThenBlocks{newDisk(diskSize)}, "WriteFrom", "after a call of Into"},
		{&swallowsInto{newDisk(diskSize)}, "WriteFrom", "as it is"},
		{&storesUnfilled{newDisk(diskSize)}, "WriteFrom", "neither"},

		{&syncsNothing{newDisk(diskSize)}, "Durability", "opened again"},
		{&fuaIsPlain{newDisk(diskSize)}, "Durability", "WriteAtFUA, opened again"},
		{&shrinksOnReopen{newDisk(diskSize)}, "Durability", "Size"},
		{&resizeKeepsTail{disk: newDisk(diskSize)}, "Resize", "Resize: byte"},
		{&resizeForgets{newDisk(diskSize)}, "Resize", "Size is"},
	} {
		t.Run(fmt.Sprintf("%T", tt.wrong), func(t *testing.T) {
			opts := Options{Seed: 1, Operations: 400, TrimZeroes: false}
			if strings.HasSuffix(tt.check, "Context") {
				opts.Stall = func(_ testing.TB, b backends.Backend) func() { return b.(stallable).stall() }
			}
			if tt.check == "Durability" {
				opts.Reopen = crash
			}
			r := record(t, tt.check, tt.wrong, opts)
			if said := strings.Join(r.failures, "\n"); !strings.Contains(said, tt.says) {
				t.Errorf("%s: the kit says %q, want %q in it", tt.check, said, tt.says)
			}
		})
	}
}

func TestOverlapsSeesForeignBytes(t *testing.T) {
	if raceEnabled {
		t.Skip("the check does not run with the race detector")
	}
	r := record(t, "Overlaps", &oneBuffer{disk: newDisk(diskSize), poison: true}, Options{Seed: 1, Operations: 2000})
	if said := strings.Join(r.failures, "\n"); !strings.Contains(said, "nobody wrote") {
		t.Errorf("the kit says %q", said)
	}
}

// A backend that cannot be checked is not a backend that has passed.
func TestEmptyBackend(t *testing.T) {
	r := record(t, "ReadEdges", newDisk(0), Options{Seed: 1})
	if len(r.failures) == 0 {
		t.Error("a backend without bytes passed")
	}
}

func TestSeed(t *testing.T) {
	// The same seed makes the same requests.
	var logs [2][]int64
	for i := range logs {
		record(t, "Random", &logged{newDisk(diskSize), &logs[i]}, Options{Seed: 7, Operations: 50})
	}
	if len(logs[0]) == 0 || len(logs[0]) != len(logs[1]) {
		t.Fatalf("%d and %d writes", len(logs[0]), len(logs[1]))
	}
	for i := range logs[0] {
		if logs[0][i] != logs[1][i] {
			t.Fatalf("write %d went to %d, then to %d", i, logs[0][i], logs[1][i])
		}
	}
}

type logged struct {
	*disk
	offsets *[]int64
}

func (l *logged) WriteAt(p []byte, off int64) (int, error) {
	*l.offsets = append(*l.offsets, off)
	return l.disk.WriteAt(p, off)
}
