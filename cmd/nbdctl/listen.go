package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"unicode/utf8"

	"github.com/mdlayher/vsock"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
)

// An endpoint is where a server is to listen, as --listen says.
type endpoint struct {
	network string // unix; tcp, tcp4 or tcp6; vsock
	address string // an absolute path; host and port; port
}

// parseEndpoint reads the value of --listen. Whatever it refuses is valid on no machine.
func parseEndpoint(v string) (endpoint, error) {
	network, address, _ := strings.Cut(v, ":")
	switch {
	case v == "":
		return endpoint{}, exit.Usagef("serve needs --listen, for example --listen unix:/run/disk.sock")
	case network == "unix" && address != "":
		return unixEndpoint("--listen "+v, address)
	case network == "tcp":
		return tcpEndpoint(v, address)
	case network == "vsock":
		return vsockEndpoint(v, address)
	}
	return endpoint{}, exit.Usagef("--listen %s: must be unix:PATH, tcp:HOST:PORT or vsock:PORT", v)
}

// maxSocketPath is what sun_path holds, less the zero at its end (unix(7)), in bytes.
const maxSocketPath = 107

// unixEndpoint makes the path absolute, for clients that stand elsewhere. It so never
// begins with "@", which Go and others take for a name outside of all file systems.
func unixEndpoint(typed, path string) (endpoint, error) {
	abs, err := filepath.Abs(path)
	switch {
	case err != nil:
		return endpoint{}, fmt.Errorf("%s: no working directory: %w", typed, err)
	case !utf8.ValidString(abs):
		return endpoint{}, exit.Usagef("%q: a path must be valid UTF-8: some clients read no other from a URI", typed)
	case len(abs) > maxSocketPath:
		return endpoint{}, exit.Usagef("%s: %s has %d bytes, and the path of a socket at most %d; choose a shorter one",
			typed, abs, len(abs), maxSocketPath)
	}
	if st, err := os.Lstat(abs); err == nil && st.Mode().Type() != fs.ModeSocket {
		return endpoint{}, notSocket(abs, st.Mode())
	}
	return endpoint{"unix", abs}, nil
}

// tcpEndpoint takes an address for what it is. Left to itself, Go listens to both
// families at the wildcard address of either.
func tcpEndpoint(v, address string) (endpoint, error) {
	host, port, err := net.SplitHostPort(address)
	var bad *net.AddrError
	if errors.As(err, &bad) {
		return endpoint{}, exit.Usagef("--listen %s: must be tcp:HOST:PORT, with an IPv6 address in brackets: %s",
			v, bad.Err)
	}
	if err := checkPort(port); err != nil {
		return endpoint{}, exit.Usagef("--listen %s: %w", v, err)
	}
	network := "tcp"
	if ip, err := netip.ParseAddr(host); err == nil {
		switch {
		case ip.Is6() && ip.IsLinkLocalUnicast() && ip.Zone() == "":
			return endpoint{}, exit.Usagef("--listen %s: an address of one link needs the interface to it: [%s%%eth0]",
				v, host)
		case ip.Is4():
			network = "tcp4"
		case !ip.Is4In6():
			network = "tcp6"
		}
	}
	return endpoint{network, address}, nil
}

func checkPort(port string) error {
	if port == "" {
		return errors.New("needs a port; with 0 any free one is taken")
	}
	if _, err := strconv.ParseFloat(port, 64); err == nil || errors.Is(err, strconv.ErrRange) {
		if _, err := strconv.ParseUint(port, 10, 16); err != nil {
			return fmt.Errorf("a port is a number from 0 to 65535, not %s", port)
		}
		return nil
	}
	if _, err := net.LookupPort("tcp", port); err != nil {
		return fmt.Errorf("%q is no port: neither a number from 0 to 65535 nor a service in /etc/services", port)
	}
	return nil
}

// listen begins to listen, and returns where with it.
func (e endpoint) listen() (net.Listener, net.Addr, error) {
	if e.network == "vsock" {
		return e.listenVsock()
	}
	if e.network == "unix" {
		l, err := listenUnix(e.address)
		return l, &net.UnixAddr{Name: e.address, Net: e.network}, err
	}
	addr, err := net.ResolveTCPAddr(e.network, e.address)
	if err != nil {
		return nil, nil, fmt.Errorf("--listen: %s: %w", e.address, err)
	}
	l, err := net.ListenTCP(e.network, addr)
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, nil, inUse(e.address)
	case errors.Is(err, syscall.EINVAL) && addr.Zone != "":
		return nil, nil, fmt.Errorf("--listen: %s: is there an interface %s? %w", e.address, addr.Zone, err)
	case err != nil:
		return nil, nil, err
	}
	// What getsockname(2) gives has no zone.
	addr = &net.TCPAddr{IP: addr.IP, Zone: addr.Zone, Port: l.Addr().(*net.TCPAddr).Port}
	if addr.IP == nil {
		addr.IP = l.Addr().(*net.TCPAddr).IP
	}
	return l, addr, nil
}

// inUse is the error of a second server.
func inUse(address string) error {
	return exit.With(exit.Busy, "%s is in use; choose another address", address)
}

// maxExportString is the length of the longest string in the NBD protocol, in bytes.
const maxExportString = 4096

// checkExportString refuses what is no string of the protocol, as the value of a flag.
func checkExportString(flag, value string) error {
	switch {
	case !utf8.ValidString(value):
		return exit.Usagef("--%s %q: must be valid UTF-8", flag, value)
	case len(value) > maxExportString:
		return exit.Usagef("--%s %.20s...: has %d bytes; the %s of an export has at most %d",
			flag, value, len(value), flag, maxExportString)
	}
	return nil
}

// exportURI is where clients find the export ("NBD URI" specification). Of a server that
// listens to all addresses it gives the one that is right on this machine.
func exportURI(a net.Addr, name string, overTLS bool) string {
	path := "/" + escape(name, "")
	scheme := "nbd"
	if overTLS {
		scheme = "nbds"
	}
	if v, ok := a.(*vsock.Addr); ok {
		return fmt.Sprintf("%s+vsock://%d:%d%s", scheme, v.ContextID, v.Port, path)
	}
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		return scheme + "+unix://" + path + "?socket=" + escape(a.String(), "/")
	}
	host := tcp.IP.String()
	switch {
	case !tcp.IP.IsUnspecified():
	case tcp.IP.To4() != nil:
		host = "127.0.0.1"
	default:
		host = "::1"
	}
	if tcp.Zone != "" {
		host += "%25" + escape(tcp.Zone, "") // RFC 6874
	}
	return scheme + "://" + net.JoinHostPort(host, strconv.Itoa(tcp.Port)) + path
}

// escape percent-encodes whatever has a meaning in a URI, to any parser: what RFC 3986
// allows in one part of it, as "&" in a path, another takes for the end of that.
func escape(s, keep string) string {
	const unreserved = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~"
	var b strings.Builder
	for i := range len(s) {
		if c := s[i]; strings.IndexByte(unreserved, c) >= 0 || strings.IndexByte(keep, c) >= 0 {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}
