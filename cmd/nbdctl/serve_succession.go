package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exports"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/parcel"
	"github.com/nbdctl/nbdctl/server"
)

// A server passes to its successor, over a Unix socket, in parcels:
//
//	successor: {"hello": 1}        the form that it knows
//	process:   a legacy, then a parcel for each descriptor of it, then one for each client
//	successor: {"ready": true}     all is there, nothing is touched
//	process:   {"go": true}        it will not serve any more
//	successor: {"serving": true}
//
// A word may be {"error": "…"} instead, and be the last. Until go the process goes on if anything
// goes wrong.

// successionForm is that in which this nbdctl speaks.
const successionForm = 1

// A word is what the two say to each other.
type word struct {
	Hello   int    `json:"hello,omitempty"`
	Ready   bool   `json:"ready,omitempty"`
	Go      bool   `json:"go,omitempty"`
	Serving bool   `json:"serving,omitempty"`
	Error   string `json:"error,omitempty"`
}

// A legacy is all that a server has but its clients.
type legacy struct {
	Listeners []heldListener    `json:"listeners"`
	Control   bool              `json:"control,omitempty"`
	Offer     exports.Offer     `json:"offer"`
	Exports   []*exports.Handed `json:"exports"`
	// Descriptors are how many each export has.
	Descriptors []int `json:"descriptors"`
	// Clients are how many have chosen an export, and Waiting how many come behind them that have
	// said nothing yet.
	Clients int `json:"clients"`
	Waiting int `json:"waiting"`
}

// A heldListener is a socket on which a server listens.
type heldListener struct {
	Network string `json:"network"`
	// Path is that of a file which goes with the server; "": there is none.
	Path string `json:"path,omitempty"`
}

// A heldClient is a client, without its descriptor.
type heldClient struct {
	Network   string           `json:"network"`
	Agreement server.Agreement `json:"agreement,omitzero"`
	// Export is its number among those of the legacy.
	Export int `json:"export"`
	// Unread was received and not executed.
	Unread []byte `json:"unread,omitempty"`
}

const (
	// helloPatience bounds the start of a successor, while clients are served.
	helloPatience = 30 * time.Second
	// holdPatience bounds how long it may take until nothing is in flight, beside the handshakes
	// that are under way, and readyPatience how long the successor may take from then on. Clients
	// wait meanwhile.
	holdPatience  = 10 * time.Second
	readyPatience = 15 * time.Second
	// lastPatience bounds the wait for what follows go.
	lastPatience = 5 * time.Second
)

// A dialogue is what a server and its successor say to each other.
type dialogue struct{ c *net.UnixConn }

func (d dialogue) say(ctx context.Context, w word) error { return d.send(ctx, w, nil) }

// send sends an object, with a descriptor if f is not nil.
func (d dialogue) send(ctx context.Context, object any, f *os.File) error {
	return d.within(ctx, func() error { return parcel.Send(d.c, object, f) })
}

// expect waits for a word of that kind.
func (d dialogue) expect(ctx context.Context, kind func(word) bool) error {
	var w word
	if err := d.receive(ctx, &w); err != nil {
		return err
	}
	switch {
	case w.Error != "":
		return &saidError{w.Error}
	case !kind(w):
		said, err := json.Marshal(w)
		return errors.Join(err, fmt.Errorf("the other process says %s out of its turn", said))
	}
	return nil
}

// receive waits for an object that comes alone.
func (d dialogue) receive(ctx context.Context, object any) error {
	f, err := d.receiveFile(ctx, object)
	if f != nil {
		f.Close()
	}
	return err
}

// receiveFile waits for an object that may come with a descriptor.
func (d dialogue) receiveFile(ctx context.Context, object any) (f *os.File, err error) {
	err = d.within(ctx, func() (err error) {
		f, err = parcel.Receive(d.c, object)
		return err
	})
	return f, err
}

// within ends what is done with the connection along with ctx. The dialogue has ended then.
func (d dialogue) within(ctx context.Context, do func() error) error {
	stop := context.AfterFunc(ctx, func() { _ = d.c.SetDeadline(time.Unix(1, 0)) })
	err := do()
	if !stop() && errors.Is(err, os.ErrDeadlineExceeded) {
		return context.Cause(ctx)
	}
	return err
}

// A saidError is what the other process has said to be wrong.
type saidError struct{ text string }

func (e *saidError) Error() string { return "the other process says: " + e.text }

// limited is a context for something that may take so long.
func limited(ctx context.Context, d time.Duration, what string) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, d, fmt.Errorf("%s within %v", what, d))
}

// unknownForm refuses a successor, or a process, that speaks in another form.
func unknownForm(form int) error {
	return exit.With(exit.Unsupported, "the server is passed on in form %d, and this nbdctl knows form %d",
		form, successionForm)
}
