package secret

import (
	"cmp"
	"io"
	"net/url"
	"slices"
	"strconv"
	"strings"
)

// A Redactor puts Hidden in the place of secrets in texts that others have made, such as the errors
// of a backend, which may repeat what it was given. It knows a secret as it is, quoted, and escaped
// for a URL; what was cut or encoded otherwise it does not find. A nil Redactor changes nothing.
type Redactor struct{ replacer *strings.Replacer }

// Redactor returns the one for the values of s; nil if there are none.
func (s Set) Redactor() *Redactor {
	var forms []string
	for _, v := range s {
		text := v.Reveal()
		quoted := strconv.Quote(text)
		quoted = quoted[1 : len(quoted)-1]
		again := strconv.Quote(quoted) // as an error that quotes it, in a log
		forms = append(forms, text, quoted, again[1:len(again)-1], url.QueryEscape(text), url.PathEscape(text))
	}
	forms = slices.DeleteFunc(forms, func(f string) bool { return f == "" })
	if len(forms) == 0 {
		return nil
	}
	// Where one secret begins another, the longer one is to be found.
	slices.SortFunc(forms, func(a, b string) int { return cmp.Compare(len(b), len(a)) })
	var pairs []string
	for _, f := range forms {
		pairs = append(pairs, f, Hidden)
	}
	return &Redactor{strings.NewReplacer(pairs...)}
}

// Text returns s without secrets.
func (r *Redactor) Text(s string) string {
	if r == nil {
		return s
	}
	return r.replacer.Replace(s)
}

// Texts returns all without secrets.
func (r *Redactor) Texts(all []string) []string {
	var clean []string
	for _, s := range all {
		clean = append(clean, r.Text(s))
	}
	return clean
}

// Error returns an error that says what err says without secrets, and wraps it.
func (r *Redactor) Error(err error) error {
	if r == nil || err == nil {
		return err
	}
	return &redacted{text: r.Text(err.Error()), err: err}
}

// Writer returns what writes to w without secrets, whole in each Write, as a log writes its lines.
// A nil w stays nil.
func (r *Redactor) Writer(w io.Writer) io.Writer {
	if r == nil || w == nil {
		return w
	}
	return &writer{r, w}
}

type redacted struct {
	text string
	err  error
}

func (e *redacted) Error() string { return e.text }
func (e *redacted) Unwrap() error { return e.err }

type writer struct {
	redactor *Redactor
	to       io.Writer
}

func (w *writer) Write(p []byte) (int, error) {
	if _, err := io.WriteString(w.to, w.redactor.Text(string(p))); err != nil {
		return 0, err
	}
	return len(p), nil
}
