package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
)

// upgrade asks an HTTP server to go on with NBD, as those of Incus and LXD do.
func upgrade(ctx context.Context, url string) (net.Conn, error) {
	var nc net.Conn
	transport := &http.Transport{DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
		var err error
		nc, err = new(net.Dialer).DialContext(ctx, network, address)
		return nc, err
	}}
	lasting, cancel := context.WithCancel(context.WithoutCancel(ctx)) // The connection outlives ctx.
	stop := context.AfterFunc(ctx, cancel)
	defer stop()
	req, err := http.NewRequestWithContext(lasting, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", "nbd")
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	stream, ok := resp.Body.(io.ReadWriteCloser)
	if resp.StatusCode != http.StatusSwitchingProtocols || !ok {
		resp.Body.Close()
		return nil, fmt.Errorf("%s: %s", url, resp.Status)
	}
	return upgraded{nc, stream}, nil
}

// An upgraded connection is used through the HTTP client, which has read ahead, or has TLS. The
// deadlines are those of the connection below.
type upgraded struct {
	net.Conn
	stream io.ReadWriteCloser
}

func (u upgraded) Read(p []byte) (int, error)  { return u.stream.Read(p) }
func (u upgraded) Write(p []byte) (int, error) { return u.stream.Write(p) }
func (u upgraded) Close() error                { return u.stream.Close() }
