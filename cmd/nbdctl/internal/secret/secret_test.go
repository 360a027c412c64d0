package secret

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const text = "hunter2 \"über\"\n&geheim"

// TestHidden holds that no way of printing or encoding shows a value, wherever it is.
func TestHidden(t *testing.T) {
	v := New(text)
	set := Set{"password": v}
	inside := struct{ hidden, Shown any }{struct{ set Set }{set}, &set}
	deep := struct{ v Value }{v}
	var log bytes.Buffer
	slog.New(slog.NewTextHandler(&log, nil)).Info("m", "value", v, "set", set, "deep", deep)
	slog.New(slog.NewJSONHandler(&log, nil)).Info("m", "value", v, "set", set, "deep", deep)
	var texts []string
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		for _, x := range []any{v, &v, set, inside, deep, []Value{v}} {
			texts = append(texts, fmt.Sprintf(verb, x))
		}
	}
	for _, x := range []any{v, &v, set, inside} {
		b, err := json.Marshal(x)
		if err != nil {
			t.Error(err)
		}
		texts = append(texts, string(b))
	}
	for _, s := range append(texts, log.String()) {
		if strings.Contains(s, "hunter2") || strings.Contains(s, fmt.Sprintf("%x", "hunter2")) {
			t.Errorf("it shows: %s", s)
		}
	}
	if v.Reveal() != text || (Value{}).Reveal() != "" {
		t.Errorf("it reveals %q", v.Reveal())
	}
}

// TestSend holds that a set arrives as it is, whatever its bytes.
func TestSend(t *testing.T) {
	var pipe bytes.Buffer
	if err := (Set{"a": New("\xff\x00\n"), "b": New(text)}).Send(&pipe); err != nil {
		t.Fatal(err)
	}
	s, err := Receive(&pipe)
	if err != nil || len(s) != 2 || s["a"].Reveal() != "\xff\x00\n" || s["b"].Reveal() != text {
		t.Errorf("received %q and %q, %v", s["a"].Reveal(), s["b"].Reveal(), err)
	}
	if _, err := Receive(strings.NewReader(`{"a":`)); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a part of it: %v", err)
	}
}

// TestParseReference holds what is a reference, and that what is none is not repeated.
func TestParseReference(t *testing.T) {
	for v, ok := range map[string]bool{
		"file:/etc/key": true, "file:key": true, "file:a:b": true, "fd:0": true, "fd:3": true, "fd:63": true,
		"hunter2": false, "": false, "file:": false, "fd:": false, "fd:1": false, "fd:2": false, "fd:-1": false,
		"fd:x":        false,
		"env:HUNTER2": false, "FILE:/etc/key": false, "fd:99999999999": false,
	} {
		r, err := ParseReference(v)
		if (err == nil) != ok || ok && r.String() != v {
			t.Errorf("%q is %v, %v", v, r, err)
		}
		if err != nil && (!errors.Is(err, ErrLiteral) || v != "" && strings.Contains(err.Error(), v+";")) {
			t.Errorf("%q: %v", v, err)
		}
	}
}

// TestRead holds what is read from where a reference leads.
func TestRead(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	inherited := func(fd int) bool { return fd != 7 }
	for _, tt := range []struct{ content, want, says string }{
		{"hunter2", "hunter2", ""},
		{"hunter2\n", "hunter2", ""},
		{"hunter2\r\n", "hunter2", ""},
		{" hunter2\n\n", " hunter2\n", ""},
		{strings.Repeat("x", maxLength) + "\n", strings.Repeat("x", maxLength), ""},
		{"", "", "is empty"},
		{"\n", "", "is empty"},
		{strings.Repeat("x", maxLength+1), "", "is longer than"},
		{strings.Repeat("x", 1<<20), "", "is longer than"},
	} {
		if err := os.WriteFile("key", []byte(tt.content), 0o600); err != nil {
			t.Fatal(err)
		}
		r, err := ParseReference("file:key")
		if err == nil {
			r, err = r.Absolute()
		}
		if err != nil || r.String() != "file:"+filepath.Join(dir, "key") {
			t.Fatalf("%v, %v", r, err)
		}
		v, err := r.Read(inherited)
		if v.Reveal() != tt.want || (err == nil) != (tt.says == "") ||
			err != nil && !strings.Contains(err.Error(), tt.says) {
			t.Errorf("of %d bytes it reads %q, %v", len(tt.content), v.Reveal(), err)
		}
	}
	if _, err := (Reference{path: "none"}).Read(inherited); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	if _, err := (Reference{fd: 7}).Read(inherited); err == nil ||
		!strings.Contains(err.Error(), "without a descriptor 7") {
		t.Error(err)
	}
}

// TestRedactor holds that no text shows a secret that it had, in the forms that are known.
func TestRedactor(t *testing.T) {
	short, long := "geheim", "geheimnis"
	r := Set{"a": New(text), "b": New(short), "c": New(long)}.Redactor()
	cause := &os.PathError{Op: "open", Path: text, Err: os.ErrNotExist}
	err := r.Error(fmt.Errorf("backend: %w", cause))
	if err.Error() != "backend: open ***: file does not exist" || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v", err)
	}
	var log bytes.Buffer
	logger := slog.New(slog.NewTextHandler(r.Writer(&log), nil))
	logger.Error("m", "error", cause, "quoted", fmt.Sprintf("%q", text))
	quoted := fmt.Sprintf("%q", text)
	for _, s := range []string{log.String(), r.Text(quoted),
		r.Text("https://u:" + url.QueryEscape(text) + "@h/" + url.PathEscape(text))} {
		if strings.Contains(s, "hunter2") || !strings.Contains(s, Hidden) {
			t.Errorf("it shows: %s", s)
		}
	}
	got := r.Texts([]string{long, short + ", " + long, "nothing"})
	if diff := cmp.Diff([]string{"***", "***, ***", "nothing"}, got); diff != "" {
		t.Error(diff)
	}
	none := Set{}.Redactor()
	if none.Text("x") != "x" || none.Error(cause) != error(cause) || none.Writer(&log) != io.Writer(&log) ||
		r.Writer(nil) != nil || r.Error(nil) != nil {
		t.Error("without secrets it changes something")
	}
	if diff := cmp.Diff([]string{"x"}, none.Texts([]string{"x"})); diff != "" {
		t.Error(diff)
	}
}
