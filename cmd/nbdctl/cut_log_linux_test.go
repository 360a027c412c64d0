package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"testing"
)

// A writeLog is what the device mapper's log-writes target has written of a disk: the writes in
// the order in which flushes and FUA have made them durable, and marks. What was never flushed is
// not there, as if the cache of the disk had lost it
// (https://docs.kernel.org/admin-guide/device-mapper/log-writes.html).
type writeLog struct {
	f       *os.File
	entries []logEntry
	marks   map[string]int // how many entries there are up to a mark
}

// A logEntry is struct log_write_entry of drivers/md/dm-log-writes.c.
type logEntry struct {
	Sector, Sectors uint64
	Flags, DataLen  uint64
	at              int64 // where its data are
}

const (
	logMagic   = 0x6a736677736872 // WRITE_LOG_MAGIC
	logDiscard = 1 << 2           // LOG_DISCARD_FLAG
	logMark    = 1 << 3           // LOG_MARK_FLAG
)

func openWriteLog(t *testing.T, path string) *writeLog {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	var super struct {
		Magic, Version, Entries uint64
		SectorSize              uint32
	}
	if err := binary.Read(f, binary.LittleEndian, &super); err != nil {
		t.Fatal(err)
	}
	if super.Magic != logMagic || super.Version != 1 || super.SectorSize != cutSector {
		t.Fatalf("this is no log: %+v", super)
	}
	l := &writeLog{f: f, marks: make(map[string]int)}
	at := int64(cutSector)
	for range super.Entries {
		p := make([]byte, cutSector)
		if _, err := f.ReadAt(p, at); err != nil {
			t.Fatal(err)
		}
		var e logEntry
		header := bytes.NewReader(p)
		for _, field := range []*uint64{&e.Sector, &e.Sectors, &e.Flags, &e.DataLen} {
			if err := binary.Read(header, binary.LittleEndian, field); err != nil {
				t.Fatal(err)
			}
		}
		at += cutSector
		e.at = at
		l.entries = append(l.entries, e)
		if e.Flags&logMark != 0 {
			l.marks[string(p[32:32+e.DataLen])] = len(l.entries)
		}
		if e.Flags&logDiscard == 0 {
			at += int64(e.Sectors) * cutSector
		}
	}
	return l
}

// replay does to a disk what the entries from the one up to the other have done.
func (l *writeLog) replay(disk *os.File, from, to int) error {
	for _, e := range l.entries[from:to] {
		n := int64(e.Sectors) * cutSector
		var data io.Reader = io.NewSectionReader(l.f, e.at, n)
		if e.Flags&logDiscard != 0 {
			data = bytes.NewReader(make([]byte, n))
		}
		if _, err := io.Copy(io.NewOffsetWriter(disk, int64(e.Sector)*cutSector), data); err != nil {
			return fmt.Errorf("%+v: %w", e, err)
		}
	}
	return nil
}
