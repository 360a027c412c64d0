//go:build !linux

package server

import "net"

// nameOf says who a client is, for people.
func nameOf(nc net.Conn) string { return nc.RemoteAddr().String() }
