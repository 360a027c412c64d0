package host

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
)

// A report is the one message of a starting process to who started it: that
// the device is ready, or why it is not.
type report struct {
	Ready *Record `json:"ready,omitempty"`
	// Warnings are for the user, ready or not.
	Warnings []string  `json:"warnings,omitempty"`
	Error    string    `json:"error,omitempty"`
	Code     exit.Code `json:"code,omitempty"`
	// Heard tells that the process which has the device knows more of the error: that has refused,
	// or gone.
	Heard bool `json:"heard,omitempty"`
}

// send writes the report to the pipe and closes it. An error means that
// whoever waited has gone.
func (r report) send(pipe *os.File) error {
	return errors.Join(json.NewEncoder(pipe).Encode(r), pipe.Close())
}

// receive waits for the report of a process. No report is an error: the
// process ended without a word, and said on stderr why.
func receive(pipe io.Reader) (*Record, []string, error) {
	r, err := read(pipe)
	if err != nil {
		return nil, nil, err
	}
	if err := r.err(); err != nil {
		return nil, r.Warnings, err
	}
	return r.Ready, r.Warnings, nil
}

// read waits for the report.
func read(pipe io.Reader) (r report, err error) {
	// A record is a few hundred bytes; whatever the other end is, this much is enough.
	if err := json.NewDecoder(io.LimitReader(pipe, 1<<20)).Decode(&r); err != nil {
		return r, fmt.Errorf("the serving process ended before the device was ready: %w", err)
	}
	return r, nil
}

// err returns why the process is not ready, if it is not.
func (r report) err() error {
	switch {
	case r.Error != "":
		return &exit.Error{Code: r.Code, Err: errors.New(r.Error)}
	case r.Ready == nil:
		return errors.New("the serving process sent an empty report")
	}
	return nil
}
