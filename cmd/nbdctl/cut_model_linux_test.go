package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

// A cutClock orders events. No two of them happen at the same time.
type cutClock struct{ atomic.Int64 }

func (c *cutClock) tick() int64 { return c.Add(1) }

// A cut is a moment at which the machine lost its power: not before the one and not after the
// other tick.
type cut struct{ after, before int64 }

// A cutModel knows all writes to a disk and all flushes of it, and so what may be on the disk
// after a cut. Writes may overlap each other and come at the same time.
type cutModel struct {
	clock *cutClock

	mu      sync.Mutex // guards the following
	writes  []*cutWrite
	sectors [][]int64 // sequence numbers of the writes to each sector
	flushes []cutFlush
}

// A cutWrite is a write of some sectors. Its number is its place among the writes, from 1 on.
type cutWrite struct {
	began, ended int64 // ended is 0 as long as it is not acknowledged
	fua          bool
}

// A cutFlush is one that was acknowledged.
type cutFlush struct{ began, ended int64 }

const cutSector = 512

func newCutModel(clock *cutClock, sectors int) *cutModel {
	return &cutModel{clock: clock, sectors: make([][]int64, sectors)}
}

// write notes the write of n sectors that is about to be made, and returns its number.
func (m *cutModel) write(sector, n int, fua bool) (seq int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.writes = append(m.writes, &cutWrite{began: m.clock.tick(), fua: fua})
	seq = int64(len(m.writes))
	for i := range n {
		m.sectors[sector+i] = append(m.sectors[sector+i], seq)
	}
	return seq
}

// wrote notes that a write was acknowledged.
func (m *cutModel) wrote(seq int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.writes[seq-1].ended = m.clock.tick()
}

// flushed notes a flush that began then, and was acknowledged just now.
func (m *cutModel) flushed(began int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.flushes = append(m.flushes, cutFlush{began, m.clock.tick()})
}

// check compares what is on the disk after a cut with what may be there. A sector has what some
// write has put there that had begun, and no write that is durable came after it; it has
// its first content only if no write is durable. A write is durable that was acknowledged
// before a flush began, if the flush was acknowledged before the cut; with FUA it is when it is
// acknowledged itself.
func (m *cutModel) check(disk []byte, c cut) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(disk) < len(m.sectors)*cutSector {
		return fmt.Errorf("%d bytes are left of %d", len(disk), len(m.sectors)*cutSector)
	}
	var flushed int64 // what was acknowledged before is durable
	for _, f := range m.flushes {
		if f.ended < c.after {
			flushed = max(flushed, f.began)
		}
	}
	var errs []error
	for i, seqs := range m.sectors {
		if err := m.checkSector(disk[i*cutSector:][:cutSector], i, seqs, flushed, c); err != nil {
			errs = append(errs, err)
		}
	}
	if n := len(errs); n > 4 {
		errs = append(errs[:4], fmt.Errorf("and %d sectors more", n-4))
	}
	return errors.Join(errs...)
}

func (m *cutModel) checkSector(p []byte, sector int, seqs []int64, flushed int64, c cut) error {
	durable := slices.DeleteFunc(slices.Clone(seqs), func(seq int64) bool {
		w := m.writes[seq-1]
		return w.ended == 0 || w.ended >= flushed && (!w.fua || w.ended >= c.after)
	})
	if bytes.Equal(p, make([]byte, cutSector)) {
		if len(durable) > 0 {
			return fmt.Errorf("sector %d is empty, and writes %v are durable", sector, durable)
		}
		return nil
	}
	seq := int64(binary.LittleEndian.Uint64(p))
	if !slices.Contains(seqs, seq) {
		return fmt.Errorf("sector %d has what no write has put there: %.16x", sector, p)
	}
	if !bytes.Equal(p, cutPattern(seq, sector)) {
		return fmt.Errorf("sector %d has a part of write %d", sector, seq)
	}
	found := m.writes[seq-1]
	if found.began > c.before {
		return fmt.Errorf("sector %d has write %d, which came after the cut", sector, seq)
	}
	for _, d := range durable {
		if found.ended != 0 && found.ended < m.writes[d-1].began {
			return fmt.Errorf("sector %d has write %d, and write %d, which came after it, is durable", sector, seq, d)
		}
	}
	return nil
}

// cutPattern is what a write puts into a sector.
func cutPattern(seq int64, sector int) []byte {
	p := binary.LittleEndian.AppendUint64(nil, uint64(seq))
	r := rand.NewPCG(uint64(seq), uint64(sector))
	for len(p) < cutSector {
		p = binary.LittleEndian.AppendUint64(p, r.Uint64())
	}
	return p
}

// TestCutModel holds that the model of TestKernelPowerCut accepts what may be on a disk after a
// cut, and nothing else.
func TestCutModel(t *testing.T) {
	var clock cutClock
	m := newCutModel(&clock, 8)
	moment := func() cut { return cut{clock.tick(), clock.tick()} }
	old := m.write(0, 2, false)
	m.wrote(old)
	unflushed := moment()
	m.flushed(clock.tick())
	flushed := moment()
	young := m.write(0, 1, false)
	began := clock.tick() // of a flush before the write is acknowledged
	m.wrote(young)
	m.flushed(began)
	beside := moment()
	fua := m.write(0, 1, true)
	m.wrote(fua)
	durable := moment()
	pending := m.write(0, 1, true)
	late := moment()

	for _, tt := range []struct {
		name   string
		at     cut
		has    [2]int64 // of the first two sectors; 0: nothing
		reject string
	}{
		{"nothing is flushed", unflushed, [2]int64{0, old}, ""},
		{"a flushed write is lost", flushed, [2]int64{old, 0}, "sector 1 is empty"},
		{"a flushed write is there", flushed, [2]int64{old, old}, ""},
		{"a write from the future", flushed, [2]int64{young, old}, "after the cut"},
		{"a write beside a flush is lost", beside, [2]int64{old, old}, ""},
		{"a write beside a flush is there", beside, [2]int64{young, old}, ""},
		{"a durable write is lost", durable, [2]int64{young, old}, "is durable"},
		{"a durable write is there", durable, [2]int64{fua, old}, ""},
		{"a write that was not acknowledged is there", late, [2]int64{pending, old}, ""},
		{"a write to another sector", late, [2]int64{fua, fua}, "no write"},
	} {
		disk := make([]byte, 8*cutSector)
		for i, seq := range tt.has {
			if seq != 0 {
				copy(disk[i*cutSector:], cutPattern(seq, i))
			}
		}
		err := m.check(disk, tt.at)
		if (err == nil) != (tt.reject == "") || err != nil && !strings.Contains(err.Error(), tt.reject) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	torn := append(cutPattern(fua, 0), make([]byte, 7*cutSector)...)
	torn[300]++
	if err := m.check(torn, late); err == nil || !strings.Contains(err.Error(), "a part of") {
		t.Errorf("torn: %v", err)
	}
}
