package main

import (
	"net"
	"path/filepath"
	"strconv"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/activation"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exports"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/quantity"
	"github.com/nbdctl/nbdctl/server"
)

// serveFlags are those of serve alone.
var serveFlags = []cli.Flag{
	&cli.StringSliceFlag{
		Name: "listen",
		Usage: "where: `ADDRESS` is unix:PATH, tcp:HOST:PORT or vsock:PORT; " +
			"0.0.0.0 is all of IPv4, [::] all of IPv6, no HOST both; may be repeated; default: the sockets that systemd passes",
	},
	&cli.StringFlag{Name: "exports", Usage: "read what to offer from `FILE`, in place of KIND (see the README)"},
	&cli.StringFlag{Name: "name", Usage: "`NAME` of the export; clients that name none get it too"},
	&cli.StringFlag{Name: "description", Usage: "`TEXT` for people who list the exports, or ask for it"},
	&cli.StringFlag{
		Name:  "tls-certificates",
		Usage: "`FOLDER` with server-cert.pem and server-key.pem; clients must use TLS then",
	},
	&cli.StringFlag{Name: "tls", Usage: "`MODE` off, allow or require, where the default is not meant"},
	&cli.BoolFlag{
		Name:  "tls-verify-peer",
		Usage: "serve clients alone that have a certificate signed by the folder's ca-cert.pem",
	},
	&cli.StringFlag{Name: "control", Usage: "answer nbdctl stats --server `PATH`, for the user who serves alone"},
	&cli.StringFlag{Name: "max-clients", Usage: "how many are served at once: `NUMBER`", DefaultText: "1024"},
	&cli.StringFlag{
		Name:        "max-per-address",
		Usage:       "how many of them from one IPv4 address, or one /64 of IPv6: `NUMBER`",
		DefaultText: "a quarter of all",
	},
	&cli.StringFlag{
		Name:        "max-memory",
		Usage:       "`SIZE` of the memory for the data of requests, of the clients of each export together",
		DefaultText: "512M",
	},
	&cli.StringFlag{
		Name:        "handshake-timeout",
		Usage:       "how many `SECONDS` a client has to choose an export",
		DefaultText: "10",
	},
}

// A servePlan is what serve is asked for. Nothing was touched for it.
type servePlan struct {
	endpoints []endpoint
	activated []net.Listener

	file   string              // of exports; "": there is one, of the command line
	single *exports.Definition // that one

	tls          tlsMode
	certificates string
	verifyPeer   bool

	control endpoint // of no network: none

	maxClients, maxPerAddress int
	maxMemory                 int64
	handshakeTimeout          time.Duration
}

// servePlanOf reads the flags. Whatever it refuses is valid on no machine. A process that succeeds
// another one has from that what it offers, and where it listens.
func servePlanOf(c *cli.Context, succeeds bool) (*servePlan, error) {
	p := &servePlan{certificates: c.String("tls-certificates"), verifyPeer: c.Bool("tls-verify-peer")}
	ends := []func() error{
		func() error { return p.readExports(c) },
		func() error { return p.readListen(c) },
	}
	if succeeds {
		ends = nil
		if c.IsSet("exports") {
			ends = append(ends, func() error { return p.readFile(c) })
		}
	}
	for _, read := range append(ends,
		func() (err error) { p.tls, err = tlsModeOf(c); return },
		func() (err error) { p.maxClients, err = readCount(c, "max-clients"); return },
		func() (err error) { p.maxPerAddress, err = readCount(c, "max-per-address"); return },
		func() error { return p.readControl(c) },
		func() error { return p.readMemory(c) },
		func() error { return p.readTimeout(c) },
	) {
		if err := read(); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// readExports reads what to offer: one export, or the name of a file.
func (p *servePlan) readExports(c *cli.Context) (err error) {
	if c.IsSet("exports") {
		return p.readFile(c)
	}
	d := exports.Definition{Name: c.String("name"), Description: c.String("description")}
	if d.Spec, err = backendOf(c, 1); err != nil {
		return err
	}
	if err := checkExportString("name", d.Name); err != nil {
		return err
	}
	if err := checkExportString("description", d.Description); err != nil {
		return err
	}
	p.single = &d
	return nil
}

func (p *servePlan) readFile(c *cli.Context) (err error) {
	if c.Args().Present() {
		return exit.Usagef("--exports: the file has all that is offered; leave out %q", c.Args().First())
	}
	for _, flag := range []string{"name", "description", "size", "block-size", "read-only", "create", "option"} {
		if c.IsSet(flag) {
			return exit.Usagef("--%s: is for one export; with --exports it belongs into the file", flag)
		}
	}
	if c.String("exports") == "" {
		return exit.Usagef("--exports: needs the path of a file")
	}
	p.file, err = filepath.Abs(c.String("exports"))
	return err
}

func (p *servePlan) readListen(c *cli.Context) (err error) {
	for _, v := range c.StringSlice("listen") {
		at, err := parseEndpoint(v)
		if err != nil {
			return err
		}
		p.endpoints = append(p.endpoints, at)
	}
	if len(p.endpoints) > 0 {
		return nil
	}
	if p.activated, err = activation.Listeners(); err == nil && len(p.activated) == 0 {
		_, err = parseEndpoint("")
	}
	return err
}

func (p *servePlan) readControl(c *cli.Context) (err error) {
	if c.IsSet("control") {
		p.control, err = unixEndpoint("--control "+c.String("control"), c.String("control"))
	}
	return err
}

func (p *servePlan) readMemory(c *cli.Context) (err error) {
	if !c.IsSet("max-memory") {
		return nil
	}
	if p.maxMemory, err = quantity.ParseSize(c.String("max-memory")); err != nil || p.maxMemory == 0 {
		return exit.Usagef("--max-memory %s: must be a size above zero, as 512M", c.String("max-memory"))
	}
	return nil
}

func (p *servePlan) readTimeout(c *cli.Context) (err error) {
	if c.IsSet("handshake-timeout") {
		p.handshakeTimeout, err = readSeconds(c, "handshake-timeout", time.Second)
	}
	return err
}

// readCount reads a number above zero; 0: it is not given.
func readCount(c *cli.Context, flag string) (int, error) {
	if !c.IsSet(flag) {
		return 0, nil
	}
	n, err := strconv.ParseUint(c.String(flag), 10, 20)
	if err != nil || n == 0 {
		return 0, exit.Usagef("--%s %s: must be a number from 1 to %d", flag, c.String(flag), 1<<20-1)
	}
	return int(n), nil
}

// offer reads what to offer, again if it is in a file.
func (p *servePlan) offer() (exports.Offer, error) {
	if p.file != "" {
		return exports.Read(p.file)
	}
	return exports.Offer{Default: p.single.Name, Exports: []exports.Definition{*p.single}}, nil
}

// handshake is how long a client may take to choose.
func (p *servePlan) handshake() time.Duration {
	if p.handshakeTimeout == 0 {
		return defaultHandshake
	}
	return min(p.handshakeTimeout, longestHandshake)
}

const (
	defaultHandshake = 10 * time.Second
	// longestHandshake is how long one may take that is not to keep a server from being handed
	// over.
	longestHandshake = 20 * time.Second
)

// server is a server within the limits of the plan.
func (p *servePlan) server() *server.Server {
	return &server.Server{
		MaxConnections:   p.maxClients,
		MaxPerAddress:    p.maxPerAddress,
		MaxMemory:        p.maxMemory,
		HandshakeTimeout: p.handshakeTimeout,
	}
}
