package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/mdlayher/vsock"

	"github.com/nbdctl/nbdctl/server/certs"
	"github.com/nbdctl/nbdctl/server/wire"
)

// A machine that vanishes without a word is noticed within 25 seconds: while data are
// unacknowledged by TCP_USER_TIMEOUT, else by keepalive (tcp(7)), whose last probe the former cuts
// short.
const unacknowledged = 20 * time.Second

var keepAlive = net.KeepAliveConfig{Enable: true, Idle: 10 * time.Second, Interval: 5 * time.Second, Count: 3}

// connect connects to a server.
func (u *URI) connect(ctx context.Context) (net.Conn, error) {
	if u.Network != "vsock" {
		d := net.Dialer{KeepAliveConfig: keepAlive, Control: limitUnacknowledged}
		return d.DialContext(ctx, u.Network, u.Address)
	}
	machine, port, _ := strings.Cut(u.Address, ":")
	context, err := strconv.ParseUint(machine, 10, 32)
	if err != nil {
		return nil, err
	}
	number, err := strconv.ParseUint(port, 10, 32)
	if err != nil {
		return nil, err
	}
	return vsock.Dial(uint32(context), uint32(number), nil)
}

// hostname is the name that the certificate of the server must have.
func (u *URI) hostname() string {
	if u.Hostname != "" {
		return u.Hostname
	}
	if u.Network == "tcp" {
		if host, _, err := net.SplitHostPort(u.Address); err == nil {
			host, _, _ = strings.Cut(host, "%") // without the zone of an IPv6 address
			return host
		}
	}
	return "localhost"
}

// Negotiate begins a negotiation with the server of a URI, over TLS if it says so; which export it
// names does not matter. It is Greet for who chooses step by step.
func (u URI) Negotiate(ctx context.Context, o Options) (*Handshake, error) {
	config, err := u.tlsConfig(&o)
	if err != nil {
		return nil, err
	}
	return u.negotiate(ctx, &o, config)
}

func (u *URI) negotiate(ctx context.Context, o *Options, config *tls.Config) (*Handshake, error) {
	var nc net.Conn
	var err error
	if o.Dial != nil {
		nc, err = o.Dial(ctx)
	} else {
		nc, err = u.connect(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("nbd: %w", err)
	}
	h, err := greet(ctx, nc, config)
	if err != nil {
		nc.Close()
		return nil, err
	}
	return h, nil
}

// greet begins a negotiation, over TLS if there is a configuration for it.
func greet(ctx context.Context, nc net.Conn, config *tls.Config) (*Handshake, error) {
	h, err := Greet(ctx, nc)
	if err != nil || config == nil {
		return h, err
	}
	if !h.fixed {
		return nil, fmt.Errorf("nbd: a server of the nonfixed negotiation has no TLS: %w", errors.ErrUnsupported)
	}
	return h, h.StartTLS(ctx, config)
}

// tlsConfig returns how TLS is to be used; nil: not at all.
func (u *URI) tlsConfig(o *Options) (*tls.Config, error) {
	switch {
	case o.TLS != nil:
		config := o.TLS.Clone()
		if config.ServerName == "" {
			config.ServerName = u.hostname()
		}
		return config, nil
	case !u.TLS:
		return nil, nil
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if u.Certificates != "" {
		var err error
		if config, err = certs.Client(u.Certificates); err != nil {
			return nil, fmt.Errorf("nbd: %w", err)
		}
	}
	config.ServerName, config.InsecureSkipVerify = u.hostname(), u.Unverified
	if u.Unverified {
		config.VerifyConnection = nil // There is no chain to be looked at.
	}
	return config, nil
}

// choose asks for the most that there is, and ends the negotiation with an export.
func (h *Handshake) choose(ctx context.Context, export string, o *Options) (*Session, error) {
	if !h.fixed {
		return h.ExportName(ctx, export)
	}
	// A server may refuse each of these in any way, and be fine without.
	refused := new(OptionError)
	optional := func(err error) error {
		if errors.As(err, &refused) && refused.Reply != wire.RepErrTLSRequired {
			return nil
		}
		return err
	}
	if !o.NoStructured && !o.NoExtended {
		if err := optional(h.ExtendedHeaders(ctx)); err != nil {
			return nil, err
		}
	}
	if !o.NoStructured && !h.extended {
		if err := optional(h.StructuredReplies(ctx)); err != nil {
			return nil, err
		}
	}
	if h.structured || h.extended {
		names := append([]string{wire.ContextAllocation}, o.Contexts...)
		if _, err := h.SetContexts(ctx, export, names...); optional(err) != nil {
			return nil, err
		}
	}
	s, err := h.Go(ctx, export)
	if errors.Is(err, errors.ErrUnsupported) && h.err == nil && !h.extended { // "NBD_OPT_EXPORT_NAME"
		return h.ExportName(ctx, export)
	}
	return s, err
}
