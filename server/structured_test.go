package server_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/server"
)

const (
	optListMeta, optSetMeta = 9, 10

	repMetaContext = 4

	cmdBlockStatus = 7

	flagDF, reqOne = 4, 8

	chunkNone, chunkData, chunkHole, chunkStatus = 0, 1, 2, 5

	chunkError, chunkErrorOffset = 1<<15 + 1, 1<<15 + 2
)

// metaData encodes the data of NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT.
func metaData(name string, queries ...string) string {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(name)))
	b = append(b, name...)
	b = binary.BigEndian.AppendUint32(b, uint32(len(queries)))
	for _, q := range queries {
		b = binary.BigEndian.AppendUint32(b, uint32(len(q)))
		b = append(b, q...)
	}
	return string(b)
}

// A chunk is a part of a structured reply.
type chunk struct {
	Type    uint16
	Payload string
}

// readChunks reads one reply, of which it checks magic, cookie and flags.
func readChunks(r io.Reader, cookie uint64) (all []chunk, err error) {
	for {
		var h [20]byte
		if _, err := io.ReadFull(r, h[:]); err != nil {
			return all, err
		}
		flags, c := binary.BigEndian.Uint16(h[4:]), binary.BigEndian.Uint64(h[8:])
		if magic := binary.BigEndian.Uint32(h[:]); magic != 0x668e33ef || c != cookie || flags > 1 {
			return all, fmt.Errorf("magic %#x, cookie %d, flags %#x", magic, c, flags)
		}
		payload := make([]byte, binary.BigEndian.Uint32(h[16:]))
		if _, err := io.ReadFull(r, payload); err != nil {
			return all, err
		}
		all = append(all, chunk{binary.BigEndian.Uint16(h[6:]), string(payload)})
		if flags == 1 {
			return all, nil
		}
	}
}

// withOptions serves b to a client that has negotiated options, and returns its end.
func withOptions(t *testing.T, b backends.Backend, o server.Options, options ...string) net.Conn {
	t.Helper()
	s := &server.Server{Exports: map[string]*server.Export{"x": export(t, b, o)}}
	ours, theirs := socketpair(t)
	done := make(chan error, 1)
	go func() {
		session, err := s.Handshake(theirs)
		if err == nil {
			err = session.Conn().Transmit()
			theirs.Close()
		}
		done <- err
	}()
	t.Cleanup(func() {
		ours.Close()
		<-done
	})
	io.ReadFull(ours, make([]byte, len(greeting)))
	choose(t, ours, "x", options...)
	return ours
}

// choose negotiates options and then an export, as a client that has been greeted.
func choose(t *testing.T, nc net.Conn, name string, options ...string) {
	t.Helper()
	io.WriteString(nc, clientFlags(3))
	for _, option := range append(options, option(optGo, infoData(name))) {
		io.WriteString(nc, option)
		for code := uint32(0); code != repAck; {
			var h [20]byte
			if _, err := io.ReadFull(nc, h[:]); err != nil {
				t.Fatalf("option reply: %v", err)
			}
			if code = binary.BigEndian.Uint32(h[12:]); code&(1<<31) != 0 {
				t.Fatalf("option %q was refused: %#x", option, code)
			}
			io.CopyN(io.Discard, nc, int64(binary.BigEndian.Uint32(h[16:])))
		}
	}
}

const page = 4096

// A holeyDisk has pages, of which those that are nil are holes. It gives them by reference.
type holeyDisk struct {
	pages [][]byte
	fails error // of reads at page 7, and of Extents
}

func (d *holeyDisk) Size() int64 { return int64(len(d.pages)) * page }

func (d *holeyDisk) ReadAt(p []byte, off int64) (int, error) {
	err := d.each(off, len(p), func(at int64, data []byte, n int) {
		if data == nil {
			clear(p[at-off:][:n])
		}
		copy(p[at-off:], data)
	})
	if err != nil {
		return int(max(0, 7*page-off)), err
	}
	return len(p), nil
}

func (d *holeyDisk) ReadAtTo(r backends.Reply, off int64, n int) error {
	return d.each(off, n, func(_ int64, data []byte, n int) {
		if data == nil {
			r.Zeros(n)
		} else {
			r.Bytes(data)
		}
	})
}

func (d *holeyDisk) Extents(off, n int64, yield func(backends.Extent) bool) error {
	stop := false
	err := d.each(off, int(n), func(at int64, data []byte, n int) {
		stop = stop || !yield(backends.Extent{Offset: at, Length: int64(n), Hole: data == nil, Zero: data == nil})
	})
	if err == nil {
		err = d.fails
	}
	return err
}

// each calls f for the parts of pages in a range; data is nil for a hole.
func (d *holeyDisk) each(off int64, n int, f func(at int64, data []byte, n int)) error {
	for n > 0 {
		i, from := int(off/page), int(off%page)
		m := min(n, page-from)
		if i == 7 && d.fails != nil {
			return d.fails
		}
		var data []byte
		if d.pages[i] != nil {
			data = d.pages[i][from:][:m]
		}
		f(off, data, m)
		off, n = off+int64(m), n-m
	}
	return nil
}

// holey makes a disk of eight pages: data, a hole, data, two holes, data, a hole, data.
func holey() *holeyDisk {
	d := &holeyDisk{pages: make([][]byte, 8)}
	for _, i := range []int{0, 2, 5, 7} {
		d.pages[i] = bytes.Repeat([]byte{byte('a' + i)}, page)
	}
	return d
}

func be64(n uint64) string { return string(binary.BigEndian.AppendUint64(nil, n)) }
func be32(n uint32) string { return string(binary.BigEndian.AppendUint32(nil, n)) }

func data(off uint64, b []byte) chunk { return chunk{chunkData, be64(off) + string(b)} }

func hole(off uint64, n uint32) chunk { return chunk{chunkHole, be64(off) + be32(n)} }

func failure(errno uint32, text string) chunk {
	return chunk{chunkError, be32(errno) + string(binary.BigEndian.AppendUint16(nil, uint16(len(text)))) + text}
}

// TestStructuredRead holds what chunks a READ is answered by, of a backend that gives references
// and knows its holes, and of one that a worker or the loop reads from ("Structured reply chunk
// message", "NBD_CMD_READ").
func TestStructuredRead(t *testing.T) {
	d := holey()
	zeroes := make([]byte, 2*page)
	for _, tt := range []struct {
		name  string
		q     call
		fails error
		want  []chunk // of the backend that knows holes
		plain []chunk // of the other; nil: the same
		// extents are those of the other if it can tell where holes are; nil: as plain
		extents []chunk
	}{
		{name: "data", q: call{op: cmdRead, length: page}, want: []chunk{data(0, d.pages[0])}},
		{name: "a part of it", q: call{op: cmdRead, offset: 100, length: 7}, want: []chunk{data(100, d.pages[0][:7])}},
		{name: "nothing", q: call{op: cmdRead, offset: 512}, want: []chunk{{chunkNone, ""}}},
		{name: "a hole", q: call{op: cmdRead, offset: page, length: page}, want: []chunk{hole(page, page)},
			plain: []chunk{data(page, zeroes[:page])}, extents: []chunk{hole(page, page)}},
		{name: "a hole, DF", q: call{op: cmdRead, flags: flagDF, offset: page, length: page},
			want: []chunk{data(page, zeroes[:page])}},
		{name: "a hole that is too small", q: call{op: cmdRead, offset: page, length: 511},
			want: []chunk{data(page, zeroes[:511])}},
		{name: "data, hole, data", q: call{op: cmdRead, length: 3 * page},
			want:  []chunk{data(0, d.pages[0]), hole(page, page), data(2*page, d.pages[2])},
			plain: []chunk{data(0, bytes.Join([][]byte{d.pages[0], zeroes[:page], d.pages[2]}, nil))}},
		{name: "DF", q: call{op: cmdRead, flags: flagDF, length: 3 * page},
			want: []chunk{data(0, bytes.Join([][]byte{d.pages[0], zeroes[:page], d.pages[2]}, nil))}},
		{name: "hole, hole", q: call{op: cmdRead, offset: 3 * page, length: 2 * page},
			want:  []chunk{hole(3*page, page), hole(4*page, page)},
			plain: []chunk{data(3*page, zeroes)}, extents: []chunk{hole(3*page, 2*page)}},
		{name: "past the end", q: call{op: cmdRead, offset: 8 * page, length: 1},
			want: []chunk{failure(einval, "past the end of the export")}},
		{name: "flag unknown", q: call{op: cmdRead, flags: noHole, length: 1},
			want: []chunk{failure(einval, "flag unknown, or not for this request type")}},
		{name: "the backend fails at the end", fails: syscall.EIO,
			q:     call{op: cmdRead, offset: 5 * page, length: 3 * page},
			want:  []chunk{failure(eio, "")},
			plain: []chunk{{chunkErrorOffset, failure(eio, "").Payload + be64(7*page)}}},
		{name: "the backend fails at once", fails: syscall.EIO, q: call{op: cmdRead, offset: 7 * page, length: page},
			want: []chunk{failure(eio, "")}},
	} {
		for _, as := range []string{"references", "plain", "plain with extents"} {
			t.Run(tt.name+"/"+as, func(t *testing.T) {
				d := holey()
				d.fails = tt.fails
				var b backends.Backend = d
				want := tt.want
				switch as {
				case "plain":
					b = struct{ backends.Backend }{d}
					if tt.plain != nil {
						want = tt.plain
					}
				case "plain with extents":
					b = struct {
						backends.Backend
						backends.Extenter
					}{d, d}
					if tt.extents != nil {
						want = tt.extents
					} else if tt.plain != nil {
						want = tt.plain
					}
				}
				nc := withOptions(t, b, server.Options{}, option(optStructured, ""))
				// Replies of others stand before and behind it in the batch.
				before, after := call{op: cmdRead, offset: 1, length: 1}, call{op: cmdFlush}
				nc.Write(append(append(before.encode(1), tt.q.encode(2)...), after.encode(3)...))
				got := map[uint64][]chunk{}
				for range 3 {
					cookie, reply := anyReply(t, nc)
					got[cookie] = reply
				}
				all := map[uint64][]chunk{1: {data(1, []byte("a"))}, 2: want, 3: nil}
				if diff := cmp.Diff(all, got); diff != "" {
					t.Errorf("(-want +got):\n%s", diff)
				}
			})
		}
	}
}

// anyReply reads a structured reply or a simple one, which has no chunks and must be a success.
func anyReply(t *testing.T, r io.Reader) (cookie uint64, all []chunk) {
	t.Helper()
	var h [16]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		t.Fatalf("reply: %v", err)
	}
	cookie = binary.BigEndian.Uint64(h[8:])
	if binary.BigEndian.Uint32(h[:]) == 0x67446698 {
		if errno := binary.BigEndian.Uint32(h[4:]); errno != 0 {
			t.Errorf("request %d: error %d", cookie, errno)
		}
		return cookie, nil
	}
	all, err := readChunks(io.MultiReader(bytes.NewReader(h[:]), r), cookie)
	if err != nil {
		t.Fatalf("reply to %d: %v", cookie, err)
	}
	return cookie, all
}

// status encodes the payload of a chunk of NBD_CMD_BLOCK_STATUS from lengths and flags.
func status(extents ...uint32) chunk {
	payload := be32(1)
	for _, n := range extents {
		payload += be32(n)
	}
	return chunk{chunkStatus, payload}
}

// TestBlockStatus holds what NBD_CMD_BLOCK_STATUS tells of base:allocation, of backends that no
// dialogue has.
func TestBlockStatus(t *testing.T) {
	const all = 8 * page
	for _, tt := range []struct {
		name  string
		o     server.Options
		q     call
		fails error
		want  chunk
	}{
		{name: "blocks larger than holes", o: server.Options{BlockSize: 2 * page}, q: call{length: all},
			want: status(all, 0)},
		{name: "the backend fails", q: call{length: page}, fails: syscall.EIO, want: failure(eio, "")},
		{name: "the backend does not know", q: call{length: page}, fails: syscall.EOPNOTSUPP, want: status(page, 0)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := holey()
			d.fails = tt.fails
			nc := withOptions(t, d, tt.o, option(optStructured, ""),
				option(optSetMeta, metaData("x", "base:allocation")))
			tt.q.op = cmdBlockStatus
			nc.Write(tt.q.encode(7))
			got, err := readChunks(nc, 7)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff([]chunk{tt.want}, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}
