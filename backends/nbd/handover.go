package nbd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"
)

const (
	// DocumentVersion is that of the Documents which this package writes. Those of another one it
	// refuses.
	DocumentVersion = 1
	// maxHanded bounds the connections of a Document.
	maxHanded = 64
	// settling is how long HandOver waits for what is still being sent.
	settling = time.Second
)

// A Document is what a process has to know of a Client to go on with it, beside the descriptors. It
// is plain data, written as JSON. What a later version adds without another Version can be left out
// by an earlier one.
type Document struct {
	Version int `json:"version"`
	// Agreement is what was agreed on with the server.
	Agreement Agreement `json:"agreement"`
	// Connections are all that the client has.
	Connections []HandedConnection `json:"connections"`
	// Since is when the last connection was lost; zero if any has a descriptor.
	Since time.Time `json:"since,omitzero"`
}

// A HandedConnection is one of the connections of a Client.
type HandedConnection struct {
	// Dead tells that it has no descriptor, and is to be replaced.
	Dead bool `json:"dead,omitempty"`
	// Contexts are those of the Agreement, by their numbers on this connection.
	Contexts Contexts `json:"contexts,omitempty"`
}

// A Handover is a Client on its way to another process. It ends with Resume or Leave: the first
// that is called counts, and the other does nothing.
type Handover struct {
	// Document and Files are what the other process needs (URI.Inherit). Files are the connections
	// that are not Dead, in the order of the Document. They are closed with the end of the
	// Handover.
	Document Document
	Files    []*os.File

	c     *Client
	conns []*conn // those that have a file
	ended sync.Once
	err   error // of Leave
}

// HandOver has the client stand still, and returns what another process needs to go on with its
// connections; the server notices nothing. All requests must have been answered before, and those
// that come meanwhile wait until the Handover ends.
//
// A connection counts as dead for the other process, which dials anew, if it uses TLS or is neither
// TCP nor a Unix stream socket, or if a reply is still to come on it, as to a read that was given
// up. Here it stays what it is, and is replaced when it is lost (Options.Reconnect), until the
// Handover ends.
func (c *Client) HandOver() (*Handover, error) {
	h, err := c.handOver()
	if err != nil {
		return nil, fmt.Errorf("nbd: the client is not handed over: %w", err)
	}
	return h, nil
}

func (c *Client) handOver() (*Handover, error) {
	c.handing.Lock()
	defer c.handing.Unlock()
	switch {
	case c.ended:
		return nil, net.ErrClosed
	case c.handover != nil:
		return nil, errors.New("it is being handed over already")
	case len(c.conns) > maxHanded:
		return nil, fmt.Errorf("it has %d connections; at most %d are possible", len(c.conns), maxHanded)
	}
	h := &Handover{c: c, Document: Document{Version: DocumentVersion, Agreement: c.agreed}}
	ctx, cancel := context.WithTimeout(context.Background(), settling)
	defer cancel()
	for i := range c.conns {
		if err := h.add(ctx, c.conns[i].Load()); err != nil {
			h.resume()
			return nil, err
		}
	}
	if len(h.Files) == 0 {
		if h.Document.Since = c.State().Since; h.Document.Since.IsZero() {
			h.Document.Since = time.Now()
		}
	}
	c.handover = h
	return h, nil
}

// add adds a connection, with a file if another process can go on with it.
func (h *Handover) add(ctx context.Context, k *conn) error {
	handed := HandedConnection{Dead: !streams(k.NetConn) || !k.park(ctx)}
	if !handed.Dead {
		h.conns = append(h.conns, k)
		f, err := duplicate(k.NetConn)
		if err != nil {
			return err
		}
		h.Files = append(h.Files, f)
		handed.Contexts = k.Contexts
	}
	h.Document.Connections = append(h.Document.Connections, handed)
	return nil
}

// streams reports whether a connection is the stream of a socket, and nothing else.
func streams(nc net.Conn) bool {
	switch nc := nc.(type) {
	case *net.TCPConn:
		return true
	case *net.UnixConn:
		local := nc.LocalAddr()
		return local != nil && local.Network() == "unix"
	}
	return false
}

// Resume has the client go on as if nothing had been.
func (h *Handover) Resume() {
	h.ended.Do(func() {
		h.c.handing.Lock()
		h.c.handover = nil
		h.c.handing.Unlock()
		h.resume()
	})
}

func (h *Handover) resume() {
	closeAll(h.Files)
	for _, k := range h.conns {
		k.resume()
	}
}

// Leave ends the client here, as Close does, but for the connections that have Files: they stay
// open for the other process, and nothing is said on them.
func (h *Handover) Leave() error {
	h.ended.Do(func() {
		h.c.handing.Lock()
		h.c.handover, h.c.ended = nil, true
		h.c.handing.Unlock()
		closeAll(h.Files)
		h.c.closing.Do(func() { h.err = h.c.end() })
	})
	return h.err
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
