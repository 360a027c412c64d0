//go:build !linux

package server

import "net"

// watchHangup is for the Linux client.
func watchHangup(net.Conn, func()) (stop func()) { return func() {} }
