package doctor

import (
	"encoding/json"
	"fmt"
	"strings"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
)

// A Result grades what a check has found.
type Result string

// The results.
const (
	OK      Result = "ok"
	Warning Result = "warning" // nbdctl works, but something is slower, less safe or other than meant
	Problem Result = "problem" // something that nbdctl does will fail here
	Unknown Result = "unknown" // it could not be looked at; Seen says for want of what
)

// A Finding is one thing that a check has to say.
type Finding struct {
	// Check is the name of the check, which does not change.
	Check  string
	Result Result
	// Seen is what was found, in words that hold without Why and Remedy.
	Seen string
	// Why says what it means for who uses nbdctl, "" if that is plain.
	Why string
	// Remedy is a command, or says what to do where there is none.
	Remedy string
	// Fix is the remedy if it is nbdctl's to do; what it returns says what was done.
	Fix func() (done string, err error)
	// Fixed says what was done.
	Fixed string
	// Code is the exit code that a problem stands for.
	Code exit.Code
}

// MarshalJSON prints the finding with stable keys, null for what there is not.
func (f Finding) MarshalJSON() ([]byte, error) {
	known := func(s string) *string {
		if s == "" {
			return nil
		}
		return &s
	}
	return json.Marshal(struct {
		Check   string  `json:"check"`
		Result  Result  `json:"result"`
		Seen    string  `json:"seen"`
		Why     *string `json:"why"`
		Remedy  *string `json:"remedy"`
		Fixable bool    `json:"fixable"`
		Fixed   *string `json:"fixed"`
	}{f.Check, f.Result, f.Seen, known(f.Why), known(f.Remedy), f.Fix != nil, known(f.Fixed)})
}

// String is the finding on a line for people.
func (f Finding) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%-7s  %-10s  %s", f.Result, f.Check, f.Seen)
	for _, part := range []struct{ before, text string }{{"", f.Why}, {"done: ", f.Fixed}, {"do: ", f.Remedy}} {
		if part.text != "" {
			fmt.Fprintf(&b, "; %s%s", part.before, part.text)
		}
	}
	return b.String()
}

// ok, warning, problem and unknown begin findings.
func ok(seen string, args ...any) Finding {
	return Finding{Result: OK, Seen: fmt.Sprintf(seen, args...)}
}

func warning(seen string, args ...any) Finding {
	return Finding{Result: Warning, Seen: fmt.Sprintf(seen, args...)}
}

func problem(code exit.Code, seen string, args ...any) Finding {
	return Finding{Result: Problem, Code: code, Seen: fmt.Sprintf(seen, args...)}
}

func unknown(needs string) Finding {
	return Finding{Result: Unknown, Seen: "not looked at: needs " + needs}
}

// because adds what it means, do what to do about it.
func (f Finding) because(why string, args ...any) Finding {
	f.Why = fmt.Sprintf(why, args...)
	return f
}

func (f Finding) do(remedy string, args ...any) Finding {
	f.Remedy = fmt.Sprintf(remedy, args...)
	return f
}
