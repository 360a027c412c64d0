package nbd_test

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"runtime"
	"testing"
	"testing/synctest"

	"github.com/nbdctl/nbdctl/backends/nbd"
)

// TestWrongGreeting holds that a client says nothing to who is no server of the newstyle
// negotiation.
func TestWrongGreeting(t *testing.T) {
	for name, says := range map[string][]byte{
		"oldstyle":        cat("NBDMAGIC", u64(0x00420281861253), u64(1<<20), u32(0x10001), make([]byte, 124)),
		"first magic":     cat("NBDMAGIK", "IHAVEOPT", u16(3)),
		"second magic":    cat("NBDMAGIC", "IHAVEOPS", u16(3)),
		"the other order": cat("IHAVEOPT", "NBDMAGIC", u16(3)),
		"backwards":       cat("CIGAMDBN", "TPOEVAHI", u16(0x300)),
		"zeroes":          make([]byte, 18),
		"HTTP":            cat("HTTP/1.1 400 Bad Request\r\n\r\n"),
		"SSH":             cat("SSH-2.0-OpenSSH_9.9p1 Debian\r\n"),
	} {
		t.Run(name, func(t *testing.T) {
			talk(t, []turn{{nil, says}}, true, func(t *testing.T, nc net.Conn) {
				h, err := nbd.Greet(context.Background(), nc)
				checkBroken(t, err, "out of step")
				if h != nil {
					t.Error("there is a Handshake")
				}
			})
		})
	}
}

// checkWrong has a client call a method and get an answer that it must not believe, in which the
// server says so much and waits. The client must give up at once, and for good.
func checkWrong(t *testing.T, m method, answer []byte, why string) {
	t.Helper()
	talk(t, greeted(turn{m.says, answer}), true, func(t *testing.T, nc net.Conn) {
		t.Helper()
		h := greet(t, nc)
		got, err := m.call(h, context.Background())
		checkBroken(t, err, why)
		if t.Failed() {
			return // It goes on, and nobody would answer.
		}
		if fmt.Sprintf("%+v", got) != "<nil>" && fmt.Sprintf("%v", got) != "[]" && got != (nbd.Info{}) {
			t.Errorf("with the error there is %+v", got)
		}
		for _, again := range methods {
			if again.name == "abort" || m.name == "abort" { // It has closed the connection then.
				continue
			}
			if _, other := again.call(h, context.Background()); other != err {
				t.Errorf("%s, later: %v, want the same error", again.name, other)
			}
		}
	})
}

// TestWrongAnswer holds that no method believes an answer that is not to its option, or is not of
// its kind, and does not wait for what such an answer announces.
func TestWrongAnswer(t *testing.T) {
	for _, m := range methods {
		if m.name == "export name" { // The answer has no header.
			continue
		}
		o := m.option
		t.Run(m.name, func(t *testing.T) {
			checkWrong(t, m, cat(magicAnswer+1, o, repAck, u32(0)), "out of step")
			checkWrong(t, m, cat("IHAVEOPT", o, repAck, u32(0)), "out of step")
			checkWrong(t, m, make([]byte, 20), "out of step")
			checkWrong(t, m, answer(o^1, repAck), "instead of")
			checkWrong(t, m, answer(o|1<<31, repAck), "instead of")
			checkWrong(t, m, answer(0, refusedUnsupported), "instead of")
			checkWrong(t, m, answer(o, repAck, "x"), "1 bytes of data")
			checkWrong(t, m, answer(o, repAck, long(4096)), "4096 bytes of data")
			for _, kind := range []u32{repAck, repServer, repInfo, repContext, refusedUnsupported, 0x7fffffff,
				0xffffffff} {
				for _, length := range []u32{65537, 1 << 31, 0xffffffff} {
					checkWrong(t, m, cat(magicAnswer, o, kind, length), fmt.Sprintf("has %d bytes", length))
				}
			}
			for kind, right := range map[u32]u32{repServer: optList, repInfo: 0, repContext: 0, 0: 0, 5: 0,
				0x7fffffff: 0} {
				if kind == repInfo && (o == optInfo || o == optGo) ||
					kind == repContext && (o == optListContexts || o == optSetContexts) || o == right {
					continue
				}
				checkWrong(t, m, answer(o, kind, u32(0)), "")
			}
		})
	}
}

// TestWrongData holds what no client believes of the data of an answer.
func TestWrongData(t *testing.T) {
	// What comes before and after is as it should be.
	list := func(data ...any) []byte {
		return cat(answer(optList, repServer, str("a")), answer(optList, repServer, data...), answer(optList, repAck))
	}
	both := func(says func(o u32) []byte, why string) {
		for _, name := range []string{"info", "go"} {
			m := the(name)
			checkWrong(t, m, cat(says(m.option), answer(m.option, repAck)), why)
		}
	}
	data := func(data ...any) func(o u32) []byte {
		return func(o u32) []byte { return cat(sized(o, 1<<20, 1), answer(o, repInfo, data...)) }
	}
	set := func(names ...string) []byte {
		var b []byte
		for i, name := range names {
			b = cat(b, answer(optSetContexts, repContext, u32(i), name))
		}
		return cat(b, answer(optSetContexts, repAck))
	}
	none := []string{long(4097), "a\x00b", "\xff", "a\xc3"} // They are no strings of the protocol.

	t.Run("list", func(t *testing.T) {
		const why = "an export that is none"
		checkWrong(t, the("list"), list(), why)
		checkWrong(t, the("list"), list("\x00\x00\x00"), why)
		checkWrong(t, the("list"), list(u32(1)), why)
		checkWrong(t, the("list"), list(u32(5), "four"), why)
		checkWrong(t, the("list"), list(u32(0xffffffff), "four"), why)
		for _, text := range none {
			checkWrong(t, the("list"), list(str(text)), why)
		}
	})
	t.Run("size", func(t *testing.T) {
		both(func(o u32) []byte { return nil }, "does not tell the size")
		both(func(o u32) []byte { return answer(o, repInfo, infoName, "disk") }, "does not tell the size")
		both(func(o u32) []byte { return sized(o, 1<<63, 1) }, "9223372036854775808 bytes")
		both(func(o u32) []byte { return sized(o, 1<<64-1, 1) }, "18446744073709551615 bytes")
		both(data(infoExport, u64(512)), "has 10 bytes")
		both(data(infoExport, u64(512), u32(1)), "has 14 bytes")
		checkWrong(t, the("export name"), cat(u64(1<<63), u16(1)), "9223372036854775808 bytes")
		checkWrong(t, the("export name"), cat(u64(1<<64-1), u16(1)), "18446744073709551615 bytes")
	})
	t.Run("information", func(t *testing.T) {
		both(data(), "without a type")
		both(data("\x00"), "without a type")
		for _, text := range none {
			both(data(infoName, text), "a text that is none")
			both(data(infoDescription, text), "a text that is none")
		}
		both(data(infoBlockSize, u32(1), u32(512)), "has 10 bytes")
		both(data(infoBlockSize, u32(1), u32(512), u32(512), u16(0)), "has 16 bytes")
	})
	t.Run("block sizes", func(t *testing.T) {
		for _, sizes := range [][3]u32{
			{0, 4096, 1 << 20},      // no minimum
			{3, 4096, 3 << 20},      // not a power of two
			{1 << 17, 1 << 17, 1e9}, // a minimum above 65536
			{512, 0, 1 << 20},       // no preference
			{512, 1536, 1 << 20},    // not a power of two
			{512, 256, 1 << 20},     // a preference below the minimum
			{512, 512, 0},           // no maximum
			{4096, 4096, 512},       // a maximum below the minimum
			{512, 512, 1<<20 + 1},   // a maximum that no request can have
			{512, 512, 1<<32 - 2},   // the same
			{1 << 31, 1 << 31, 1 << 31},
		} {
			both(data(infoBlockSize, sizes[0], sizes[1], sizes[2]), "its block sizes are impossible")
		}
	})
	t.Run("contexts", func(t *testing.T) {
		for _, m := range []method{the("list contexts"), the("set contexts")} {
			const why = "a meta context that is none"
			checkWrong(t, m, answer(m.option, repContext), why)
			checkWrong(t, m, answer(m.option, repContext, "\x00\x00\x00"), why)
			for _, text := range none {
				checkWrong(t, m, cat(answer(m.option, repContext, u32(1), text), answer(m.option, repAck)), why)
			}
		}
		const why = "a context that was not asked for"
		m := the("set contexts")
		checkWrong(t, m, set("a:b", "e:f"), why)
		checkWrong(t, m, set("a:b", ""), why)
		checkWrong(t, m, set("disk"), why) // It is the name of the export.
		checkWrong(t, m, set("a:b", "c:d", "a:b"), why)
		checkWrong(t, m, cat(answer(m.option, repContext, u32(9), "a:b"),
			answer(m.option, repContext, u32(9), "c:d")), why)
	})
}

// TestTooManyContexts holds that a server can't set more contexts than a client has room for.
func TestTooManyContexts(t *testing.T) {
	var names []string
	var says []byte
	for i := range 65 {
		names = append(names, fmt.Sprintf("a:%d", i))
		says = append(says, answer(optSetContexts, repContext, u32(i), names[i])...)
	}
	m := the("set contexts")
	m.says = contexts(optSetContexts, "disk", names...)
	m.call = func(h *nbd.Handshake, ctx context.Context) (any, error) { return h.SetContexts(ctx, "disk", names...) }
	checkWrong(t, m, says, "number 64")
	all := cat(says[:64*len(says)/65], answer(optSetContexts, repAck)) // The last ones are of one length.
	talk(t, greeted(turn{m.says, all}), true, func(t *testing.T, nc net.Conn) {
		if got, err := m.call(greet(t, nc), context.Background()); err != nil || len(got.(nbd.Contexts)) != 64 {
			t.Errorf("%v: %v", got, err)
		}
	})
}

// TestFlood holds that an answer without an end comes to one, before it has taken much memory.
func TestFlood(t *testing.T) {
	tests := []struct {
		name   string
		method method
		reply  []byte
		most   int // so many replies are taken
		why    string
	}{
		{"exports", the("list"), answer(optList, repServer, str("")), 65536, "more than 65536 parts"},
		{"long exports", the("list"), answer(optList, repServer, str(long(4096)), long(60000)), 16<<20/64100 + 1,
			"more than 16777216 bytes"},
		{"sizes", the("info"), sized(optInfo, 512, 1), 1024, "more than 1024 parts"},
		{"texts", the("go"), answer(optGo, repInfo, infoName, long(4096)), 1024, "more than 1024 parts"},
		{"unknown", the("go"), answer(optGo, repInfo, u16(77), long(60000)), 1024, "more than 1024 parts"},
		{"contexts", the("list contexts"), answer(optListContexts, repContext, u32(1), long(4096)), 1024,
			"more than 1024 parts"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client, server := net.Pipe()
				taken := make(chan int, 1)
				flood := bytes.Repeat(tt.reply, 1000)
				go func() {
					if err := speak(server, greeted(turn{tt.method.says, nil})); err != nil {
						t.Error(err)
					}
					total := 0
					for range 1000 { // That makes a million.
						n, err := server.Write(flood)
						if total += n; err != nil {
							break
						}
					}
					taken <- total
				}()
				h := greet(t, client)
				var err error
				if n := allocated(func() { _, err = tt.method.call(h, context.Background()) }); n > 64<<20 {
					t.Errorf("it took %d MiB", n>>20)
				}
				checkBroken(t, err, tt.why)
				client.Close()
				if n := <-taken / len(tt.reply); n > tt.most {
					t.Errorf("%d replies were taken, want %d at most", n, tt.most)
				}
			})
		})
	}
}

// TestLengthWithoutData holds that a client does not take memory for what it is only told of.
func TestLengthWithoutData(t *testing.T) {
	for _, m := range methods {
		if m.name == "export name" {
			continue
		}
		talk(t, greeted(turn{m.says, cat(magicAnswer, m.option, refusedPolicy, u32(0xffffffff))}), true,
			func(t *testing.T, nc net.Conn) {
				h := greet(t, nc)
				if n := allocated(func() { m.call(h, context.Background()) }); n > 64<<10 {
					t.Errorf("%s: it took %d KiB", m.name, n>>10)
				}
			})
	}
}

// allocated returns how many bytes were allocated while f ran, freed or not.
func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}
