package nbd_test

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/backends/nbd"
	"github.com/nbdctl/nbdctl/server/wire"
)

// TestWrongErrors holds that a connection ends on which an error is none.
func TestWrongErrors(t *testing.T) {
	const none = "an error that is none"
	chunk := func(kind u16, payload ...any) func(*rig, query) []byte {
		return func(r *rig, q query) []byte { return r.chunk(q, done, kind, payload...) }
	}
	head := func(kind u16, length u64) func(*rig, query) []byte {
		return func(r *rig, q query) []byte { return r.header(q, done, kind, length) }
	}
	var tests []wrongReply
	for _, command := range []u16{cmdRead, cmdWrite, cmdStatus} {
		for _, kind := range []u16{chunkError, chunkErrorOffset, 0x8003, 0xffff} {
			tests = append(tests,
				wrongReply{"nothing", chunked, command, chunk(kind), none},
				wrongReply{"no length of the text", chunked, command, chunk(kind, u32(5), "\x00"), none},
				wrongReply{"a text that is longer than it is", chunked, command, chunk(kind, u32(5), u16(3), "no"),
					none},
				wrongReply{"a text that is much longer than it is", chunked, command,
					chunk(kind, u32(5), u16(0xffff), "no"), none},
				wrongReply{"no error", chunked, command, chunk(kind, u32(0), u16(0), u64(wrongOffset)), none},
				wrongReply{"more than a text", chunked, command, head(kind, 4161), "an error in 4161 bytes"},
				wrongReply{"4 GiB", chunked, command, head(kind, 0xffffffff), "an error in 4294967295 bytes"},
				wrongReply{"2⁶⁴ bytes", []form{extended}, command, head(kind, 1<<64-1),
					"an error in 18446744073709551615 bytes"},
			)
		}
		tests = append(tests,
			wrongReply{"no offset", chunked, command, chunk(chunkErrorOffset, u32(5), u16(2), "no"), none},
			wrongReply{"half an offset", chunked, command,
				chunk(chunkErrorOffset, u32(5), u16(2), "no", u32(wrongOffset)), none},
			wrongReply{"an offset and more", chunked, command,
				chunk(chunkErrorOffset, u32(5), u16(2), "no", u64(wrongOffset), "\x00"), none},
			wrongReply{"an offset before the request", chunked, command,
				chunk(chunkErrorOffset, u32(5), u16(0), u64(wrongOffset-1)), none},
			wrongReply{"an offset behind the request", chunked, command,
				chunk(chunkErrorOffset, u32(5), u16(0), u64(wrongOffset+wrongLength+1)), none},
			wrongReply{"an offset within the request", chunked, command,
				chunk(chunkErrorOffset, u32(5), u16(0), u64(1)), none},
			wrongReply{"an offset at the end of numbers", chunked, command,
				chunk(chunkErrorOffset, u32(5), u16(0), u64(1<<64-1)), none},
		)
	}
	checkReplies(t, tests)
}

// errnos are the error numbers of the protocol, and what they are on this system.
var errnos = map[u32]error{
	1: syscall.EPERM, 5: syscall.EIO, 12: syscall.ENOMEM, 22: syscall.EINVAL, 28: syscall.ENOSPC, 75: syscall.EOVERFLOW,
	95: syscall.ENOTSUP, 108: syscall.ESHUTDOWN,
	2: syscall.EIO, 30: syscall.EIO, 1000: syscall.EIO, 0xffffffff: syscall.EIO, // Those are none.
}

// commands are all that a caller makes.
var commands = []u16{cmdRead, cmdWrite, cmdFlush, cmdTrim, cmdCache, cmdZeroes, cmdStatus}

// TestErrnos holds that each request can fail with each number, and that the connection goes on.
func TestErrnos(t *testing.T) {
	for number, want := range errnos {
		for _, command := range commands {
			each(t, forms, func(t *testing.T, r *rig) {
				if command == cmdStatus && r.form == simple {
					return
				}
				is := r.makes(command)
				q := r.next()
				r.say(r.failed(q, number, ""))
				err := (<-is).err
				var failed *nbd.RequestError
				if !errors.As(err, &failed) || !errors.Is(err, want) {
					t.Fatalf("%d of command %d is %v, want %v", number, command, err, want)
				}
				told := nbd.RequestError{Command: wire.Command(command), Offset: q.offset, Length: q.length,
					Errno: wire.Errno(number), At: q.offset}
				if diff := cmp.Diff(told, *failed); diff != "" {
					t.Errorf("-want +got:\n%s", diff)
				}
				if !strings.Contains(err.Error(), fmt.Sprintf("of %d bytes at %d: %v", q.length, q.offset, want)) {
					t.Error(err)
				}
				r.works()
			})
		}
	}
}

// TestSimpleErrors holds that requests other than READ may be answered by a simple reply also where
// structured ones were agreed on, if it has no data.
func TestSimpleErrors(t *testing.T) {
	for _, command := range commands[1:] {
		bubble(t, structured, func(t *testing.T, r *rig) {
			is := r.makes(command)
			r.say(r.next().simple(28))
			if err := (<-is).err; !errors.Is(err, syscall.ENOSPC) {
				t.Errorf("command %d: %v", command, err)
			}
			if command != cmdStatus {
				is := r.makes(command)
				r.say(r.next().simple(0))
				if err := (<-is).err; err != nil {
					t.Errorf("command %d: %v", command, err)
				}
			}
			r.works()
		})
	}
}

// TestErrorsInReads holds that an error in the middle of a READ reaches the caller, with what the
// server says to it, wherever it comes among the data, and that the connection goes on.
func TestErrorsInReads(t *testing.T) {
	const off, n = wrongOffset, wrongLength
	kinds := map[string]struct {
		chunk func(r *rig, q query, flags u16) []byte
		want  nbd.RequestError
		says  string
	}{
		"an error": {
			func(r *rig, q query, flags u16) []byte {
				return r.chunk(q, flags, chunkError, u32(5), u16(7), "why not")
			},
			nbd.RequestError{Errno: 5, Text: "why not", At: off}, `(the server says "why not")`},
		"without a text": {
			func(r *rig, q query, flags u16) []byte { return r.chunk(q, flags, chunkError, u32(5), u16(0)) },
			nbd.RequestError{Errno: 5, At: off}, "input/output error"},
		"an error with more than it has": {
			func(r *rig, q query, flags u16) []byte {
				return r.chunk(q, flags, chunkError, u32(5), u16(0), u64(off+1))
			},
			nbd.RequestError{Errno: 5, At: off}, "input/output error"},
		"the longest text": {
			func(r *rig, q query, flags u16) []byte {
				return r.chunk(q, flags, chunkErrorOffset, u32(12), u16(4096), long(4096), u64(off+1))
			},
			nbd.RequestError{Errno: 12, Text: long(4096), At: off + 1}, "failed at 5001"},
		"a longer text": {
			func(r *rig, q query, flags u16) []byte {
				return r.chunk(q, flags, chunkError, u32(5), u16(4154), long(4154))
			},
			nbd.RequestError{Errno: 5, Text: long(4096), At: off}, "xxx"},
		"a text that is none": {
			func(r *rig, q query, flags u16) []byte {
				return r.chunk(q, flags, chunkError, u32(5), u16(3), "a\xff\x00")
			},
			nbd.RequestError{Errno: 5, Text: "a\uFFFD\x00", At: off}, `\x00")`},
		"at the first byte": {
			func(r *rig, q query, flags u16) []byte {
				return r.chunk(q, flags, chunkErrorOffset, u32(5), u16(0), u64(off))
			},
			nbd.RequestError{Errno: 5, At: off}, "input/output error"},
		"at the last byte": {
			func(r *rig, q query, flags u16) []byte {
				return r.chunk(q, flags, chunkErrorOffset, u32(28), u16(2), "no", u64(off+n-1))
			},
			nbd.RequestError{Errno: 28, Text: "no", At: off + n - 1}, "failed at 5999"},
		"at the end": {
			func(r *rig, q query, flags u16) []byte {
				return r.chunk(q, flags, chunkErrorOffset, u32(5), u16(0), u64(off+n))
			},
			nbd.RequestError{Errno: 5, At: off + n}, "failed at 6000"},
		"of a type that nobody knows": {
			func(r *rig, q query, flags u16) []byte {
				return r.chunk(q, flags, 0x8003, u32(22), u16(2), "no", make([]byte, 100))
			},
			nbd.RequestError{Errno: 22, Text: "no", At: off}, "invalid argument"},
		"of the last type": {
			func(r *rig, q query, flags u16) []byte { return r.chunk(q, flags, 0xffff, u32(77), u16(0)) },
			nbd.RequestError{Errno: 77, At: off}, "input/output error"},
		"two": {
			func(r *rig, q query, flags u16) []byte {
				return cat(r.chunk(q, 0, chunkErrorOffset, u32(28), u16(5), "first", u64(off+7)),
					r.chunk(q, flags, chunkErrorOffset, u32(5), u16(6), "second", u64(off+9)))
			},
			nbd.RequestError{Errno: 28, Text: "first", At: off + 7}, "failed at 5007"},
	}
	for name, kind := range kinds {
		for _, before := range []int{0, 500, n} {
			for _, after := range []int{0, 300, n - 500, n} {
				if before+after > n {
					continue
				}
				t.Run(fmt.Sprintf("%s, behind %d bytes and before %d", name, before, after), func(t *testing.T) {
					each(t, chunked, func(t *testing.T, r *rig) {
						p := bytes.Repeat([]byte{0xee}, n+20)
						is := r.read(p[10:10+n], off)
						q := r.next()
						if before > 0 {
							r.say(r.chunk(q, 0, chunkData, u64(off), pattern(off, before)))
						}
						if after > 0 {
							r.say(kind.chunk(r, q, 0), r.chunk(q, done, chunkData, u64(off+n-after), pattern(0, after)))
						} else {
							r.say(kind.chunk(r, q, done))
						}
						got := <-is
						want := kind.want
						want.Command, want.Offset, want.Length = 0, off, n
						var failed *nbd.RequestError
						if !errors.As(got.err, &failed) || got.n != 0 {
							t.Fatalf("%d bytes: %v", got.n, got.err)
						}
						if diff := cmp.Diff(want, *failed); diff != "" {
							t.Errorf("-want +got:\n%s", diff)
						}
						if !strings.Contains(got.err.Error(), kind.says) {
							t.Error(got.err)
						}
						if bytes.Count(p[:10], []byte{0xee}) != 10 || bytes.Count(p[10+n:], []byte{0xee}) != 10 {
							t.Error("what is around the data was written to")
						}
						r.works()
					})
				})
			}
		}
	}
}

// TestErrorsOfOthers holds that requests with an error leave those alone that are answered between
// its chunks.
func TestErrorsOfOthers(t *testing.T) {
	each(t, chunked, func(t *testing.T, r *rig) {
		p, other := make([]byte, 1000), make([]byte, 1000)
		is := r.read(p, 0)
		q := r.next()
		others := r.read(other, 500)
		o := r.next()
		r.say(r.chunk(o, 0, chunkData, u64(1000), pattern(1000, 500)), r.chunk(q, 0, chunkError, u32(5), u16(0)),
			r.chunk(o, done, chunkData, u64(500), pattern(500, 500)), r.chunk(q, done, chunkNone))
		if got := <-others; got.err != nil || !bytes.Equal(other, pattern(500, 1000)) {
			t.Errorf("%v, %s", got.err, firstDifference(other, pattern(500, 1000)))
		}
		if got := <-is; !errors.Is(got.err, syscall.EIO) {
			t.Error(got.err)
		}
	})
}
