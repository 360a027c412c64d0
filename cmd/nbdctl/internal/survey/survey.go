// Package survey finds out what an NBD server offers.
package survey

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/nbdctl/nbdctl/backends/nbd"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/server/wire"
)

// A Server is what one offers to this client. Its JSON form is part of the command line: all keys
// are always there, and null is what is not known.
type Server struct {
	URI string `json:"uri"`
	// TLS is the version of it, such as "TLS 1.3".
	TLS *string `json:"tls"`
	// Replies is the most that the server can do: "extended", "structured" or "simple".
	Replies string   `json:"replies"`
	Exports []Export `json:"exports"`
}

// An Export is one of a server.
type Export struct {
	Name        string      `json:"name"`
	Description *string     `json:"description"`
	Size        int64       `json:"size"` // in bytes
	ReadOnly    bool        `json:"read_only"`
	Flags       []string    `json:"flags"`
	BlockSize   *BlockSizes `json:"block_size"`
	Contexts    []string    `json:"contexts"`
}

// BlockSizes are what a server has told of them, in bytes.
type BlockSizes struct {
	Minimum   uint32 `json:"minimum"`
	Preferred uint32 `json:"preferred"`
	Maximum   uint32 `json:"maximum"`
}

// Look asks a server about the export of the URI, or, if that names none, about all that it lists.
// It may take patience.
func Look(ctx context.Context, u nbd.URI, patience time.Duration) (*Server, error) {
	ctx, cancel := withPatience(ctx, u, patience)
	defer cancel()
	h, err := u.Negotiate(ctx, nbd.Options{})
	if err != nil {
		return nil, Explain(err)
	}
	defer h.Close()
	s := &Server{URI: u.String(), Exports: []Export{}}
	if secure, ok := h.NetConn().(*tls.Conn); ok {
		version := tls.VersionName(secure.ConnectionState().Version)
		s.TLS = &version
	}
	if s.Replies, err = replies(ctx, h); err != nil {
		return nil, Explain(err)
	}
	names, err := namesOf(ctx, h, u)
	if err != nil {
		return nil, Explain(err)
	}
	for _, name := range names {
		e, err := look(ctx, h, u, name, s.Replies)
		if err != nil {
			return nil, Explain(err)
		}
		s.Exports = append(s.Exports, e)
	}
	// The server may answer whatever it likes to that, or nothing.
	h.Abort(ctx)
	return s, nil
}

// withPatience ends a context when a server has not answered in time.
func withPatience(ctx context.Context, u nbd.URI, patience time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, patience, fmt.Errorf("%v has not answered within %v", u, patience))
}

// replies asks for the most that there is.
func replies(ctx context.Context, h *nbd.Handshake) (string, error) {
	var refused *nbd.OptionError
	switch err := h.ExtendedHeaders(ctx); {
	case err == nil:
		return "extended", nil
	case errors.Is(err, nbd.ErrTLSRequired) || !errors.As(err, &refused):
		return "", err
	}
	switch err := h.StructuredReplies(ctx); {
	case err == nil:
		return "structured", nil
	case !errors.As(err, &refused):
		return "", err
	}
	return "simple", nil
}

// namesOf is which exports to ask about. A server that does not tell may have one without a name.
func namesOf(ctx context.Context, h *nbd.Handshake, u nbd.URI) ([]string, error) {
	if u.Export != "" {
		return []string{u.Export}, nil
	}
	listed, err := h.List(ctx)
	if refused := new(nbd.OptionError); errors.As(err, &refused) {
		return []string{""}, nil
	}
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range listed {
		names = append(names, e.Name)
	}
	return names, nil
}

// look asks about one export. A server that does not know NBD_OPT_INFO is asked on a connection of
// its own, as is one that has an export of no bytes: nbd-server, as of 3.24, answers so until the
// export is opened (handle_info in nbd-server.c).
func look(ctx context.Context, h *nbd.Handshake, u nbd.URI, name, replies string) (Export, error) {
	i, err := h.Info(ctx, name)
	refused := new(nbd.OptionError)
	unknown := errors.As(err, &refused) && refused.Reply == wire.RepErrUnsup
	if unknown || err == nil && i.Size == 0 {
		u.Export = name
		var c *nbd.Client
		if c, err = u.Dial(ctx, nbd.Options{ReadOnly: true}); err == nil {
			i = c.Agreement().Info
			err = c.Close()
		}
	}
	if err != nil {
		return Export{}, fmt.Errorf("export %q: %w", name, err)
	}
	e := Export{
		Name: name, Size: i.Size, ReadOnly: i.Flags&wire.FlagReadOnly != 0,
		Flags: flagsOf(i.Flags), Contexts: []string{},
	}
	if i.Description != "" {
		e.Description = &i.Description
	}
	if b := i.BlockSizes; b != (wire.BlockSizes{}) {
		e.BlockSize = &BlockSizes{b.Minimum, b.Preferred, b.Maximum}
	}
	if replies == "simple" {
		return e, nil
	}
	contexts, err := h.ListContexts(ctx, name)
	if err != nil && !errors.As(err, &refused) {
		return Export{}, err
	}
	for _, x := range contexts {
		e.Contexts = append(e.Contexts, x.Name)
	}
	return e, nil
}

// flagsOf are the names of all flags but those that say nothing more.
func flagsOf(f wire.Flags) []string {
	names := []string{}
	for bit := wire.Flags(1); bit != 0; bit <<= 1 {
		if f&bit != 0 && bit != wire.FlagHasFlags && bit != wire.FlagReadOnly {
			names = append(names, bit.String())
		}
	}
	return names
}

// Explain gives an error of a client its exit code: an export that is not there, and certificates
// that one of the two does not accept.
func Explain(err error) error {
	var refused *nbd.OptionError
	var verification *tls.CertificateVerificationError
	var ended *net.OpError
	switch {
	case errors.As(err, &refused) && refused.Reply == wire.RepErrUnknown:
		return &exit.Error{Code: exit.NotFound, Err: err}
	case errors.As(err, &verification), errors.Is(err, nbd.ErrTLSRequired),
		// Package crypto/tls tells so of an alert, which is how a server refuses the certificate of
		// its client, or says that it wants one.
		errors.As(err, &ended) && ended.Op == "remote error":
		return &exit.Error{Code: exit.Permission, Err: err}
	case errors.Is(err, errors.ErrUnsupported):
		return &exit.Error{Code: exit.Failure, Err: err} // It is the server, not this machine.
	}
	return err
}
