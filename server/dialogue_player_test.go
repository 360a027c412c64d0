package server_test

import (
	"errors"
	"io"
	"strings"
	"testing"
	"time"
)

// TestDialoguePlayer holds that a dialogue fails, and at which line, with a server that says one
// byte that is wrong, too many or too few, or that hangs.
func TestDialoguePlayer(t *testing.T) {
	const text = `vector greeting
S: "hello"
C: "ask"
S: "answer"
   u16:7
end
`
	for _, tt := range []struct {
		name   string
		answer string
		stays  bool   // the server does not hang up
		at     string // where it fails; empty: it does not
		err    string
	}{
		{name: "right", answer: "answer\x00\x07"},
		{name: "the first byte is wrong", answer: "Answer\x00\x07", at: "x.txt:4", err: "byte 0 is 0x41, want 0x61"},
		{name: "the last byte is wrong", answer: "answer\x00\x08", at: "x.txt:4", err: "byte 7 is 0x08, want 0x07"},
		{name: "a byte too many", answer: "answer\x00\x07!", at: "x.txt:6", err: `1 bytes more: "!"`},
		{name: "an answer too many", answer: "answer\x00\x07answer\x00\x07", at: "x.txt:6", err: "8 bytes more"},
		{name: "a byte too few", answer: "answer\x00", at: "x.txt:4", err: "said 7 bytes, and 1 more are wanted: EOF"},
		{name: "no answer", at: "x.txt:4", err: "said 0 bytes, and 8 more are wanted: EOF"},
		{name: "it hangs", stays: true, at: "x.txt:4", err: "said 0 bytes, and 8 more are wanted: read"},
		{name: "it hangs in the middle", answer: "ans", stays: true, at: "x.txt:4", err: "said 3 bytes"},
		{name: "it stays", answer: "answer\x00\x07", stays: true, at: "x.txt:6", err: "the connection stays open"},
		{name: "it stays and says more", answer: "answer\x00\x07!", stays: true, at: "x.txt:6", err: "1 bytes more"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var p dialogueParser
			if err := p.parse("x.txt", text); err != nil {
				t.Fatal(err)
			}
			ours, theirs := socketpair(t)
			if _, err := io.WriteString(theirs, "hello"+tt.answer); err != nil {
				t.Fatal(err)
			}
			patience := 2 * time.Second
			if tt.stays {
				patience = 300 * time.Millisecond
			} else {
				theirs.CloseWrite()
			}
			raw := &countedConn{Conn: ours}
			err := (&player{nc: raw, raw: raw, patience: patience}).play(p.dialogues[0].steps)
			var failed *stepError
			switch {
			case err == nil && tt.at == "":
			case !errors.As(err, &failed) || failed.at != tt.at || !strings.Contains(err.Error(), tt.err):
				t.Errorf("error %v, want %q at %q", err, tt.err, tt.at)
			}
		})
	}
}

// TestDialogueFault holds that a known fault is the only failure that is let pass, and only as long
// as it is there.
func TestDialogueFault(t *testing.T) {
	known := dialogue{fault: "it is known", faulty: 3}
	sound := dialogue{faulty: -1}
	for _, tt := range []struct {
		name  string
		d     dialogue
		err   error
		wrong bool
	}{
		{"no fault", sound, nil, false},
		{"a failure", sound, &stepError{3, "x", io.EOF}, true},
		{"the fault", known, &stepError{3, "x", io.EOF}, false},
		{"another failure", known, &stepError{2, "x", io.EOF}, true},
		{"a failure of no step", known, io.EOF, true},
		{"the fault is mended", known, nil, true},
	} {
		if wrong := tt.d.judge(tt.err); (wrong != nil) != tt.wrong {
			t.Errorf("%s: %v", tt.name, wrong)
		}
	}
}

// TestDialogueTokens holds what bytes tokens stand for, and what is none.
func TestDialogueTokens(t *testing.T) {
	for _, tt := range []struct{ line, want, err string }{
		{line: `"a b" u8:1 u16:2 u32:3 u64:4`, want: "a b\x01\x00\x02\x00\x00\x00\x03\x00\x00\x00\x00\x00\x00\x00\x04"},
		{line: `"ab"*3 zero*2 x:00ff`, want: "ababab\x00\x00\x00\xff"},
		{line: `"\x00\"☺" "b"*2^1 "c"`, want: "\x00\"☺bbc"},
		{line: `u16:NBD_OPT_GO|8 u32:2^31+1 u64:2^63-1 u8:10-3`,
			want: "\x00\x0f\x80\x00\x00\x01\x7f\xff\xff\xff\xff\xff\xff\xff\x07"},
		{line: `"a"*0 zero*0 ""`},
		{line: "u8:256", err: "does not fit"},
		{line: "u16:0-1", err: "does not fit"},
		{line: "u24:1", err: "no kind of token"},
		{line: "NBD_OPT_GO", err: "no kind of token"},
		{line: "u32:NBD_OPT_STOP", err: "neither a number nor a name"},
		{line: "u64:2^64", err: "no power of two"},
		{line: "u8:", err: "neither a number nor a name"},
		{line: "x:0", err: "odd length"},
		{line: `"a`, err: "invalid syntax"},
		{line: `"a"b`, err: "is followed by"},
		{line: `"a"*b`, err: "neither a number nor a name"},
	} {
		got, err := parseTokens(tt.line)
		if tt.err != "" {
			if err == nil || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("%s: error %v, want %q", tt.line, err, tt.err)
			}
			continue
		}
		if b := string(got.head(100)); b != tt.want || err != nil || got.size() != uint64(len(b)) {
			t.Errorf("%s: %q, %v, want %q", tt.line, b, err, tt.want)
		}
		for n := range tt.want {
			if b := string(got.drop(uint64(n)).head(100)); b != tt.want[n:] {
				t.Errorf("%s: without %d bytes %q, want %q", tt.line, n, b, tt.want[n:])
			}
		}
	}
}

// TestDialogueFormat holds what is refused of a file, and where.
func TestDialogueFormat(t *testing.T) {
	for name, tt := range map[string]struct{ text, err string }{
		"outside":           {"S: u8:1\n", "x.txt:1: \"S: u8:1\" outside of a vector or a block"},
		"no step":           {"vector a\nread\n", `x.txt:2: "read" is no step`},
		"more than a word":  {"vector a\nend now\n", `x.txt:2: "end" is no step`},
		"a bad token":       {"vector a\n\nC: u8:1\n  u8:999 # too much\nend\n", "x.txt:3: u8:999: 999 does not fit"},
		"no end":            {"vector a\nS: u8:1\nvector b\nend\n", `x.txt:3: vector "a" does not say how it ends`},
		"no end, the last":  {"vector a\nS: u8:1\n", `x.txt: vector "a" does not say how it ends`},
		"no steps":          {"vector a\nexports: disk\n", `vector "a" has no steps`},
		"twice":             {"vector a\nend\nvector a\nend\n", `x.txt:3: a second vector "a"`},
		"a block twice":     {"block a\nend\nblock a\nend\n", `x.txt:3: a second block "a"`},
		"an unknown block":  {"vector a\nuse b\n", `x.txt:2: no block "b" so far`},
		"a fault of none":   {"vector a\nend\nfault: it stays\n", `vector "a" has no step behind fault:`},
		"open, but no such": {"vector a\nopen\n", `no block "open/negotiation" so far`},
	} {
		p := dialogueParser{blocks: make(map[string][]step)}
		if err := p.parse("x.txt", tt.text); err == nil || !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%s: error %v, want %q", name, err, tt.err)
		}
	}
}
