// Package secret holds what nobody but the process that needs it may read: the password of an
// option, say. A Value shows as *** wherever it is printed, logged or written down; a Reference is
// how a user gives one, for a command line can be read by everybody (ps); a Redactor takes values
// out of texts that others have made.
package secret

import (
	"encoding/json"
	"fmt"
	"io"
)

// Hidden stands in the place of a value.
const Hidden = "***"

// A Value is one secret. It has no form to print or to encode but Hidden. Whoever copies what
// Reveal returns answers for where it goes.
type Value struct {
	// text is a pointer, which package fmt does not follow inside of another struct.
	text *string
}

// New returns the value of a text.
func New(text string) Value { return Value{&text} }

// Reveal returns the text; that of the zero Value is empty.
func (v Value) Reveal() string {
	if v.text == nil {
		return ""
	}
	return *v.text
}

// String returns Hidden.
func (Value) String() string { return Hidden }

// Format prints Hidden, whatever the verb.
func (Value) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, Hidden) } // f never fails

// MarshalText returns Hidden, for JSON and logs.
func (Value) MarshalText() ([]byte, error) { return []byte(Hidden), nil }

// A Set has the values of options by their keys.
type Set map[string]Value

// Send writes the set, with its texts, to one who is to have them: a pipe that a process inherits.
func (s Set) Send(w io.Writer) error {
	texts := make(map[string][]byte) // whose bytes need not be UTF-8
	for key, v := range s {
		texts[key] = []byte(v.Reveal())
	}
	return json.NewEncoder(w).Encode(texts)
}

// Receive reads what Send has written.
func Receive(r io.Reader) (Set, error) {
	var texts map[string][]byte
	if err := json.NewDecoder(r).Decode(&texts); err != nil {
		return nil, fmt.Errorf("secrets: %w", err)
	}
	s := make(Set)
	for key, text := range texts {
		s[key] = New(string(text))
	}
	return s, nil
}
