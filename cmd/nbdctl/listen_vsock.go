package main

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"strconv"
	"syscall"

	"github.com/mdlayher/vsock"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
)

// anyContext is VMADDR_CID_ANY of <linux/vm_sockets.h>. As a port the number is none.
const anyContext = math.MaxUint32

// vsockEndpoint reads the port of a socket between virtual machines and their host (vsock(7)). It
// has 32 bits.
func vsockEndpoint(v, port string) (endpoint, error) {
	n, err := strconv.ParseUint(port, 10, 32)
	if err != nil || n == anyContext {
		return endpoint{}, exit.Usagef("--listen %s: a port is a number from 0 to %d; with 0 any free one is taken",
			v, uint32(anyContext-1))
	}
	return endpoint{"vsock", port}, nil
}

// bindVsock listens to a port. If it is 0 it takes a free one that fits in 31 bits: the kernel
// would take one of 32, which libnbd does not find in a URI.
func bindVsock(port uint32) (l net.Listener, err error) {
	const attempts, privileged = 16, 1024
	if port != 0 {
		return listenVsockAt(port)
	}
	for range attempts {
		l, err = listenVsockAt(privileged + rand.Uint32N(math.MaxInt32-privileged))
		if !errors.Is(err, syscall.EADDRINUSE) {
			break
		}
	}
	return l, err
}

// listenVsock listens to whoever can reach this machine: the host, virtual machines on it, itself.
// Clients elsewhere find it by the number that the machine has, if it has one.
func (e endpoint) listenVsock() (net.Listener, net.Addr, error) {
	port, err := strconv.ParseUint(e.address, 10, 32)
	if err != nil {
		return nil, nil, err
	}
	l, err := bindVsock(uint32(port))
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, nil, inUse("vsock:" + e.address)
	case errors.Is(err, syscall.EAFNOSUPPORT):
		return nil, nil, exit.With(exit.Unsupported, "--listen vsock:%s: this kernel has no vsock: %w", e.address, err)
	case err != nil:
		return nil, nil, fmt.Errorf("--listen vsock:%s: %w", e.address, err)
	}
	at := &vsock.Addr{ContextID: vsock.Local, Port: l.Addr().(*vsock.Addr).Port}
	if id, err := vsock.ContextID(); err == nil && id != anyContext {
		at.ContextID = id
	}
	return l, at, nil
}
