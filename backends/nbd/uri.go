package nbd

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/nbdctl/nbdctl/server/wire"
)

// DefaultPort is the TCP port of NBD (IANA). Servers on vsock have the same number.
const DefaultPort = 10809

// A URI says where an export is, as the URI document of the NBD project has it
// (https://github.com/NetworkBlockDevice/nbd/blob/master/doc/uri.md), with two additions of
// libnbd's: vsock, and the folder of certificates.
type URI struct {
	// Network is "tcp", "unix" or "vsock".
	Network string
	// Address is HOST:PORT, the path of a socket ("@" and a name for one in the abstract namespace
	// of Linux), or CONTEXT:PORT with the context ID of a machine.
	Address string
	// Export is the name of the export, and may be empty.
	Export string
	// TLS: nothing is told to the server, or believed of it, without TLS.
	TLS bool
	// Certificates is the folder of "tls-certificates"; "": the authorities of this system, and no
	// certificate of the client.
	Certificates string
	// Hostname is the name that the certificate must have ("tls-hostname"); "": the host of
	// Address, or "localhost" where that has none.
	Hostname string
	// Unverified takes any certificate of the server for good ("tls-verify-peer=0").
	Unverified bool
}

// ParseURI reads a URI. Whatever it does not know is an error, as are the user name and the types
// of TLS that are for pre-shared keys, which package crypto/tls does not have.
func ParseURI(s string) (URI, error) {
	u, err := parseURI(s)
	if err != nil {
		return URI{}, fmt.Errorf("NBD URI %q: %w", shown(s), err)
	}
	return u, nil
}

// shown is s without a password.
func shown(s string) string {
	if parsed, err := url.Parse(s); err == nil {
		return parsed.Redacted()
	}
	if at := strings.LastIndex(s, "@"); at >= 0 {
		return "…" + s[at:]
	}
	return s
}

func parseURI(s string) (URI, error) {
	parsed, err := url.Parse(s)
	if err != nil {
		var inside *url.Error // It would tell the URI again.
		if errors.As(err, &inside) {
			err = inside.Err
		}
		return URI{}, err
	}
	var u URI
	scheme, transport, _ := strings.Cut(parsed.Scheme, "+")
	switch scheme {
	case "nbd":
	case "nbds":
		u.TLS = true
	default:
		return URI{}, errors.New("its scheme must be one of nbd, nbds, nbd+unix, nbds+unix, nbd+vsock, nbds+vsock")
	}
	switch {
	case parsed.Opaque != "":
		return URI{}, errors.New("// must follow its scheme")
	case parsed.Fragment != "" || strings.Contains(s, "#"):
		return URI{}, errors.New("a fragment (#) means nothing here; in a name it is %23")
	case parsed.User != nil:
		return URI{}, errors.New("a user name is for TLS with pre-shared keys, which is not supported")
	}
	u.Export = strings.TrimPrefix(parsed.Path, "/")
	if err := wire.CheckString(u.Export); err != nil {
		return URI{}, fmt.Errorf("export name: %w", err)
	}
	socket, err := u.query(parsed.RawQuery)
	if err != nil {
		return URI{}, err
	}
	if (transport == "unix") != (socket != "") {
		return URI{}, errors.New("the parameter socket is for nbd+unix and nbds+unix, which must have it")
	}
	switch {
	case transport == "" && !strings.Contains(parsed.Scheme, "+"):
		err = u.tcp(parsed)
	case transport == "unix":
		err = u.unix(parsed, socket)
	case transport == "vsock":
		err = u.vsock(parsed)
	default:
		err = fmt.Errorf("there is no %q to reach a server by; unix and vsock are possible", transport)
	}
	return u, err
}

// query reads the parameters. A plus sign is one, as in every part of a URI (RFC 3986).
func (u *URI) query(raw string) (socket string, err error) {
	seen := make(map[string]bool)
	for _, pair := range strings.FieldsFunc(raw, func(r rune) bool { return r == '&' }) {
		name, value, _ := strings.Cut(pair, "=")
		if value, err = url.PathUnescape(value); err != nil {
			return "", fmt.Errorf("parameter %s: %w", name, err)
		}
		switch {
		case seen[name]:
			return "", fmt.Errorf("the parameter %s is there twice", name)
		case strings.HasPrefix(name, "tls-") && !u.TLS:
			return "", fmt.Errorf("the parameter %s is for nbds", name)
		}
		seen[name] = true
		switch name {
		case "socket":
			socket = value
		case "tls-certificates":
			u.Certificates = value
		case "tls-hostname":
			u.Hostname = value
		case "tls-verify-peer":
			verify, err := strconv.ParseBool(value)
			if err != nil {
				return "", errors.New("the parameter tls-verify-peer is 0 or 1")
			}
			u.Unverified = !verify
		case "tls-type":
			if value != "x509" {
				return "", fmt.Errorf("TLS of type %q is not supported, only x509", value)
			}
		default:
			return "", fmt.Errorf("unknown parameter %q", name)
		}
	}
	return socket, nil
}

func (u *URI) tcp(parsed *url.URL) error {
	host, port, err := parts(parsed)
	if err != nil {
		return err
	}
	if host == "" {
		return errors.New("the host is missing")
	}
	u.Network, u.Address = "tcp", net.JoinHostPort(host, strconv.FormatUint(uint64(port), 10))
	if port == 0 || port > 0xffff {
		return fmt.Errorf("%d is no TCP port", port)
	}
	return nil
}

func (u *URI) unix(parsed *url.URL, socket string) error {
	if parsed.Host != "" {
		return errors.New("a Unix socket has no host: write nbd+unix:///EXPORT?socket=PATH")
	}
	u.Network, u.Address = "unix", socket
	if name, abstract := strings.CutPrefix(socket, "\x00"); abstract {
		u.Address = "@" + name
	} else if strings.HasPrefix(socket, "@") {
		u.Address = "./" + socket // To package net it would be another one.
	}
	if strings.Contains(u.Address, "\x00") {
		return errors.New("the path of the socket has a zero byte in it")
	}
	return nil
}

// hostContext is VMADDR_CID_HOST of <linux/vm_sockets.h>, the machine that a virtual one is on.
const hostContext = 2

func (u *URI) vsock(parsed *url.URL) error {
	host, port, err := parts(parsed)
	if err != nil {
		return err
	}
	context := uint64(hostContext)
	if host != "" {
		if context, err = strconv.ParseUint(host, 10, 32); err != nil {
			return fmt.Errorf("%q is not the number of a machine on vsock (2 is the host)", host)
		}
	}
	u.Network, u.Address = "vsock", fmt.Sprintf("%d:%d", context, port)
	return nil
}

// parts returns host and port of the authority.
func parts(parsed *url.URL) (host string, port uint32, err error) {
	host = parsed.Hostname()
	if strings.HasPrefix(parsed.Host, "[") {
		if a, err := netip.ParseAddr(host); err != nil || !a.Is6() {
			return "", 0, fmt.Errorf("%q is not an IPv6 address", host)
		}
		if strings.ContainsFunc(host, func(r rune) bool { return r >= utf8.RuneSelf }) {
			return "", 0, fmt.Errorf("%q: a zone beyond ASCII can't be written in a URI", host)
		}
	} else if strings.Contains(host, ":") {
		return "", 0, fmt.Errorf("%q: an IPv6 address is in brackets", parsed.Host)
	}
	text := parsed.Port()
	if text == "" {
		if strings.HasSuffix(parsed.Host, ":") {
			return "", 0, errors.New("the port is missing behind the colon")
		}
		return host, DefaultPort, nil
	}
	n, err := strconv.ParseUint(text, 10, 32)
	if err != nil {
		return "", 0, fmt.Errorf("%q is no port", text)
	}
	return host, uint32(n), nil
}

// String returns the URI as it is written, without what is the default.
func (u URI) String() string {
	scheme, host := "nbd", ""
	if u.TLS {
		scheme = "nbds"
	}
	var query []string
	add := func(name, value string) {
		if value != "" {
			query = append(query, name+"="+escape(value))
		}
	}
	switch u.Network {
	case "unix":
		scheme += "+unix"
		path := u.Address
		if name, abstract := strings.CutPrefix(path, "@"); abstract {
			path = "\x00" + name
		}
		add("socket", path)
	case "vsock":
		scheme, host = scheme+"+vsock", u.Address
	default:
		host = u.Address
	}
	// Package url knows what is escaped in a host.
	host = strings.TrimSuffix(host, ":"+strconv.Itoa(DefaultPort))
	host = strings.TrimPrefix((&url.URL{Host: host}).String(), "//")
	add("tls-certificates", u.Certificates)
	add("tls-hostname", u.Hostname)
	if u.Unverified {
		add("tls-verify-peer", "0")
	}
	s := scheme + "://" + host + "/" + escape(u.Export)
	if len(query) > 0 {
		s += "?" + strings.Join(query, "&")
	}
	return s
}

// escape leaves slashes as they are: they stand for themselves in a name and in a parameter.
func escape(s string) string {
	return strings.NewReplacer("+", "%20", "%2F", "/").Replace(url.QueryEscape(s))
}
