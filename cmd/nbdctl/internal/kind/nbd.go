package kind

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/nbdctl/nbdctl/backends/nbd"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/survey"
	"github.com/nbdctl/nbdctl/server/wire"
)

const (
	// Remote is the name of the kind whose argument is a URI.
	Remote = "nbd"
	// DefaultOutage is how long requests wait for a server that is away, unless it is said.
	DefaultOutage = time.Minute
	// defaultTimeout is how long a server may be silent, unless it is said.
	defaultTimeout = 30 * time.Second
	// dialPatience is how long a server may take at first, and awaitPatience, where it may be away,
	// to come back.
	dialPatience, awaitPatience = 30 * time.Second, 100 * time.Second
)

var nbdKind = Kind{
	Name:     Remote,
	Synopsis: "nbd://HOST/EXPORT",
	Summary: "an export of an NBD server; also nbds:// (TLS), nbd+unix:///EXPORT?socket=PATH and nbd+vsock://; " +
		"-o await=on waits for a server that is away",
	Options: []string{"await"},
	Check: func(s host.Spec) error {
		if _, err := nbd.ParseURI(s.Arg); err != nil {
			return exit.Usagef("%w", err)
		}
		if s.Create {
			return exit.Usagef("--create: an export is made by its server; leave it out")
		}
		_, err := onOff(s, "await", false)
		return err
	},
	Open: openRemote,
}

// IsURI reports whether an argument is the URI of an export, which needs no kind before it.
func IsURI(arg string) bool { return strings.Contains(arg, "://") }

// IsRemote reports whether the kind of that name is reached over a network.
func IsRemote(name string) bool { return name == Remote }

// AbsoluteURI has the paths of a URI mean the same in any working directory.
func AbsoluteURI(arg string) (string, error) {
	u, err := nbd.ParseURI(arg)
	if err != nil {
		return "", err
	}
	for _, path := range []*string{&u.Address, &u.Certificates} {
		if *path == "" || path == &u.Address && (u.Network != "unix" || strings.HasPrefix(u.Address, "@")) {
			continue
		}
		if *path, err = filepath.Abs(*path); err != nil {
			return "", err
		}
	}
	return u.String(), nil
}

func openRemote(ctx context.Context, s host.Spec, export bool) (*host.Backing, error) {
	u, err := nbd.ParseURI(s.Arg)
	if err != nil {
		return nil, err
	}
	await, err := onOff(s, "await", false)
	if err != nil {
		return nil, err
	}
	patience, block := dialPatience, s.BlockSize
	if await {
		patience = awaitPatience
	}
	if block == 0 && !export {
		block = host.DefaultBlockSize
	}
	outage, timeout := s.DeadTimeout, s.Timeout
	if outage == 0 {
		outage = DefaultOutage
	}
	if timeout == 0 {
		timeout = defaultTimeout
	}
	changed := make(chan struct{}, 1)
	notify := func(nbd.State) {
		select {
		case changed <- struct{}{}:
		default:
		}
	}
	ctx, cancel := context.WithTimeoutCause(ctx, patience,
		fmt.Errorf("%v has not answered within %v", u, patience))
	defer cancel()
	c, err := u.Dial(ctx, nbd.Options{
		Connections: s.Connections, ReadOnly: s.ReadOnly, BlockSize: block, Timeout: timeout,
		Reconnect: &nbd.Reconnect{Timeout: outage, Await: await, Notify: notify},
	})
	if err != nil {
		return nil, survey.Explain(err)
	}
	b := &host.Backing{Backend: c, Close: c.Close, Remote: &host.Remote{
		Wait: outage, Changed: changed, State: func() host.RemoteState { return stateOf(c) },
		GiveUp: func() { c.Close() },
	}}
	if s.Size != 0 && s.Size != c.Size() {
		err := exit.Usagef("--size: %v has %d bytes; leave --size out to take it as it is", u, c.Size())
		return nil, errors.Join(err, c.Close())
	}
	warn := func(format string, args ...any) {
		b.Warnings = append(b.Warnings, fmt.Sprintf("%v: "+format, append([]any{u}, args...)...))
	}
	a := c.Agreement()
	if tail := a.Size - c.Size(); tail != 0 {
		warn("its last %d bytes are left out: they are less than a block", tail)
	}
	if n := c.Connections(); n < s.Connections {
		warn("the server does not promise that connections agree, so it gets %d", n)
	}
	if a.Flags&(wire.FlagReadOnly|wire.FlagSendFlush) == 0 && !s.ReadOnly {
		warn("the server has no flush: what is written is as durable as it makes it by itself")
	}
	return b, nil
}

// stateOf is what is told of a client.
func stateOf(c *nbd.Client) host.RemoteState {
	s, a := c.State(), c.Agreement()
	r := host.RemoteState{
		Way: "relay", TLS: a.TLS, Connections: c.Connections(), Alive: s.Alive, Replaced: s.Replaced, Replies: "simple",
	}
	switch {
	case a.Extended:
		r.Replies = "extended"
	case a.Structured:
		r.Replies = "structured"
	}
	if !s.Since.IsZero() {
		r.LostSince = &s.Since
	}
	if s.Err != nil {
		text := s.Err.Error()
		r.Error = &text
	}
	return r
}
