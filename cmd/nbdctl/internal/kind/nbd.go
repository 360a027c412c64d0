package kind

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/nbdctl/nbdctl/backends/blocksize"
	"github.com/nbdctl/nbdctl/backends/nbd"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/survey"
	"github.com/nbdctl/nbdctl/server/blockdev"
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
		"-o await=on waits for a server that is away, and -o way=relay has requests pass through this process",
	Options: []string{"await", "way"},
	Check: func(s host.Spec) error {
		if s.Create {
			return exit.Usagef("--create: an export is made by its server; leave it out")
		}
		_, err := readRemote(s, false)
		return err
	},
	Open:    openRemote,
	Inherit: inheritRemote,
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

// A remote is an export of another server that is to be opened.
type remote struct {
	uri     nbd.URI
	spec    host.Spec
	await   bool
	way     string // host.Direct, host.Relay; "": direct if that is possible
	block   int    // bytes that the device counts in; 0: bytes
	outage  time.Duration
	timeout time.Duration
}

func readRemote(s host.Spec, export bool) (r remote, err error) {
	r = remote{spec: s, block: s.BlockSize, outage: s.DeadTimeout, timeout: s.Timeout}
	if r.uri, err = nbd.ParseURI(s.Arg); err != nil {
		return r, exit.Usagef("%w", err)
	}
	if r.await, err = onOff(s, "await", false); err != nil {
		return r, err
	}
	switch way, _ := option(s, "way"); way {
	case "", host.Direct, host.Relay:
		r.way = way
	default:
		return r, exit.Usagef("-o way=%s: the ways are %s and %s", way, host.Direct, host.Relay)
	}
	if r.block == 0 && !export {
		r.block = host.DefaultBlockSize
	}
	if r.outage == 0 {
		r.outage = DefaultOutage
	}
	if r.timeout == 0 {
		r.timeout = defaultTimeout
	}
	return r, nil
}

func openRemote(ctx context.Context, s host.Spec, export bool) (*host.Backing, error) {
	r, err := readRemote(s, export)
	if err != nil {
		return nil, err
	}
	patience := dialPatience
	if r.await {
		patience = awaitPatience
	}
	ctx, cancel := context.WithTimeoutCause(ctx, patience,
		fmt.Errorf("%v has not answered within %v", r.uri, patience))
	defer cancel()
	why := r.noDirect(export)
	if why == "" && r.way != host.Relay {
		var b *host.Backing
		if b, why, err = r.openDirect(ctx); b != nil || err != nil {
			return b, err
		}
	}
	if r.way == host.Direct {
		return nil, exit.With(exit.Unsupported, "%v: the kernel can't speak with it: %s; leave -o way=direct out",
			r.uri, why)
	}
	return r.openRelay(ctx, export)
}

// noDirect tells why the kernel can't speak with the server itself, as far as is known before it is
// asked.
func (r *remote) noDirect(export bool) string {
	switch {
	case export:
		return "an export is served here"
	case r.uri.TLS:
		return "it knows no TLS"
	case r.uri.Network != "tcp" && r.uri.Network != "unix":
		return "it knows TCP and Unix sockets only"
	case r.spec.Ioctl:
		return "by ioctls no connection can be replaced"
	}
	return ""
}

func (r *remote) options() nbd.Options {
	return nbd.Options{
		Connections: r.spec.Connections, ReadOnly: r.spec.ReadOnly, BlockSize: r.block, Timeout: r.timeout,
		Reconnect: &nbd.Reconnect{Timeout: r.outage, Await: r.await},
	}
}

// openDirect opens it for the kernel, or tells why that can't speak with it.
func (r *remote) openDirect(ctx context.Context) (_ *host.Backing, why string, _ error) {
	d, err := r.uri.DialDirect(ctx, r.options())
	if err != nil {
		return nil, "", survey.Explain(err)
	}
	sizes := d.BlockSizes()
	switch {
	case sizes.Minimum > os.Getpagesize():
		why = fmt.Sprintf("it asks for blocks of %d bytes", sizes.Minimum)
	case r.spec.BlockSize != 0 && r.spec.BlockSize < sizes.Minimum:
		why = fmt.Sprintf("--block-size %d is less than the %d bytes that it asks for", r.spec.BlockSize, sizes.Minimum)
	case sizes.Maximum != 0 && sizes.Maximum < os.Getpagesize():
		why = fmt.Sprintf("it takes no more than %d bytes at once", sizes.Maximum)
	}
	if why != "" {
		return nil, why, d.Close()
	}
	b := r.directBacking(d)
	connections := r.spec.Connections
	if d.Flags()&wire.FlagCanMultiConn == 0 {
		connections = 1
	}
	return b, "", r.check(b, d.Agreement(), d.Size(), connections)
}

// directBacking is what the serving process does about an export with which the kernel speaks.
func (r *remote) directBacking(d *nbd.Direct) *host.Backing {
	state := func() (json.RawMessage, error) {
		agreed := d.Agreement()
		return json.Marshal(remoteState{Direct: &agreed})
	}
	return &host.Backing{
		Close: d.Close, Identity: r.identity(),
		Remote: &host.Remote{Wait: r.outage, Export: d, State: func(device *blockdev.Device) host.RemoteState {
			return directState(device, d.BlockSizes().Minimum)
		}},
		HandOver: func() (*host.Handed, error) {
			s, err := state()
			return &host.Handed{State: s, Resume: func() {}, Leave: d.Close}, err
		},
		// The server may be away when the next process takes the place of this one.
		Keep: func() (host.Kept, error) {
			s, err := state()
			return host.Kept{State: s}, err
		},
	}
}

// identity tells the export from the others of its server.
func (r *remote) identity() string { return fmt.Sprintf("export %q", r.uri.Export) }

// directState is what is told of a device that the kernel has connected itself to a server whose
// requests are of so many bytes at least.
func directState(d *blockdev.Device, minimum int) host.RemoteState {
	o := d.Outage()
	r := host.RemoteState{
		Way: host.Direct, Connections: d.Connections(), Alive: o.Alive, Replaced: o.Replaced, Replies: "simple",
		BlockSize: max(minimum, 1),
	}
	r.Lost(o.Since, o.Err)
	return r
}

func (r *remote) openRelay(ctx context.Context, export bool) (*host.Backing, error) {
	changed := make(chan struct{}, 1)
	c, err := r.uri.Dial(ctx, r.relayOptions(changed))
	if err != nil {
		return nil, survey.Explain(err)
	}
	b, err := r.relayBacking(c, export, changed)
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	if need := c.BlockSizes().Minimum; !export && r.needsLayer(need) {
		b.Warnings = append(b.Warnings, fmt.Sprintf("%v: the server takes blocks of %d bytes only: "+
			"what is written to a part of one is slower, for the rest has to be read before", r.uri, need))
	}
	return b, r.check(b, c.Agreement(), c.Size(), c.Connections())
}

// relayOptions are those of a client whose connections come and go. changed has a value then.
func (r *remote) relayOptions(changed chan struct{}) nbd.Options {
	o := r.options()
	o.Reconnect.Notify = func(nbd.State) {
		select {
		case changed <- struct{}{}:
		default:
		}
	}
	return o
}

// relayBacking is what the serving process does about a client, which stays the caller's if that
// fails.
func (r *remote) relayBacking(c *nbd.Client, export bool, changed <-chan struct{}) (b *host.Backing, err error) {
	b = &host.Backing{
		Backend: c, Close: c.Close, Identity: r.identity(),
		Remote: &host.Remote{
			Wait: r.outage, Changed: changed, GiveUp: func() { c.Close() },
			State: func(*blockdev.Device) host.RemoteState { return relayState(c) },
		},
		HandOver: func() (*host.Handed, error) { return handOverRelay(c) },
		// A connection over TLS does not go along. What was written over it the flush of another
		// one may not reach.
		Synced: c.Agreement().TLS,
	}
	if !export && r.needsLayer(c.BlockSizes().Minimum) {
		b.Backend, err = blocksize.New(c, r.block)
	}
	return b, err
}

func handOverRelay(c *nbd.Client) (*host.Handed, error) {
	h, err := c.HandOver()
	if err != nil {
		return nil, err
	}
	state, err := json.Marshal(remoteState{Relay: &h.Document})
	if err != nil {
		h.Resume()
		return nil, err
	}
	return &host.Handed{State: state, Files: h.Files, Resume: h.Resume, Leave: h.Leave}, nil
}

// A remoteState is what the next process has to know of an export of another server. It has one of
// the two.
type remoteState struct {
	Direct *nbd.Agreement `json:"direct,omitempty"`
	Relay  *nbd.Document  `json:"relay,omitempty"`
}

// inheritRemote goes on with an export of another server, to which it says nothing.
func inheritRemote(_ context.Context, s host.Spec, i host.Inheritance) (*host.Backing, error) {
	r, err := readRemote(s, i.Export)
	var state remoteState
	if err == nil {
		err = json.Unmarshal(i.State, &state)
	}
	switch {
	case err != nil:
	case state.Direct != nil && len(i.Files) == 0:
		d, err := r.uri.InheritDirect(*state.Direct, r.options())
		if err != nil {
			return nil, err
		}
		return r.directBacking(d), nil
	case state.Relay != nil:
		changed := make(chan struct{}, 1)
		c, err := r.uri.Inherit(*state.Relay, i.Files, r.relayOptions(changed))
		if err != nil {
			return nil, err
		}
		return r.relayBacking(c, i.Export, changed)
	default:
		err = fmt.Errorf("%v: the other process does not tell how it is connected", r.uri)
	}
	i.Close()
	return nil, err
}

// needsLayer reports whether the device is to have smaller blocks than the server takes. Those of a
// page and less it can have itself.
func (r *remote) needsLayer(need int) bool {
	return need > r.block && (need > os.Getpagesize() || r.spec.BlockSize != 0)
}

// check says what is wrong, or not as it was meant, with an export that was opened. On error that
// is closed.
func (r *remote) check(b *host.Backing, a nbd.Agreement, size int64, connections int) error {
	if r.spec.Size != 0 && r.spec.Size != size {
		err := exit.Usagef("--size: %v has %d bytes; leave --size out to take it as it is", r.uri, size)
		return errors.Join(err, b.Close())
	}
	warn := func(format string, args ...any) {
		b.Warnings = append(b.Warnings, fmt.Sprintf("%v: "+format, append([]any{r.uri}, args...)...))
	}
	if tail := a.Size - size; tail != 0 {
		warn("its last %d bytes are left out: they are less than a block", tail)
	}
	if connections < r.spec.Connections {
		warn("the server does not promise that connections agree, so it gets %d", connections)
	}
	if a.Flags&(wire.FlagReadOnly|wire.FlagSendFlush) == 0 && !r.spec.ReadOnly {
		warn("the server has no flush: what is written is as durable as it makes it by itself")
	}
	return nil
}

// relayState is what is told of a client.
func relayState(c *nbd.Client) host.RemoteState {
	s, a := c.State(), c.Agreement()
	r := host.RemoteState{
		Way: host.Relay, Replies: "simple", TLS: a.TLS,
		Connections: c.Connections(), Alive: s.Alive, Replaced: s.Replaced,
		BlockSize: max(int(a.BlockSizes.Minimum), 1),
	}
	switch {
	case a.Extended:
		r.Replies = "extended"
	case a.Structured:
		r.Replies = "structured"
	}
	r.Lost(s.Since, s.Err)
	return r
}
