package server_test

import (
	"context"
	"crypto/tls"
	"io"
	"math"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/server"
	"github.com/nbdctl/nbdctl/testdata/certs"
)

// TestHostilePeers has strangers do all that they can at once, as fast as they can: the server
// takes no more memory and no more goroutines than it says, and an honest client from elsewhere
// is served.
func TestHostilePeers(t *testing.T) {
	const (
		clients, perAddress = 300, 200
		memory              = 64 << 20
		// What a client costs besides the data of its requests: goroutines, and buffers on both
		// sides.
		goroutinesEach, bytesEach = 6, 1 << 20
	)
	goroutines, bytes := runtime.NumGoroutine()+goroutinesEach*perAddress, uint64(memory+perAddress*bytesEach+64<<20)
	a := certs.New(t)
	s := secureServer(t, a)
	s.MaxConnections, s.MaxPerAddress, s.MaxMemory, s.HandshakeTimeout = clients, perAddress, memory, time.Second
	s.Exports["x"] = export(t, newDisk(64<<20), server.Options{})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()

	ctx, stop := context.WithCancel(t.Context())
	var attackers sync.WaitGroup
	attack := func(n int, do func(net.Conn)) {
		for range n {
			attackers.Go(func() {
				for ctx.Err() == nil {
					visit(ctx, l.Addr().String(), do)
				}
			})
		}
	}
	choose := clientFlags(3) + option(optExportName, "x")
	attack(20, func(net.Conn) {})                                                                       // knocks
	attack(20, func(c net.Conn) { io.WriteString(c, clientFlags(3)+startTLS); drain(c) })               // stops in TLS
	attack(5, func(c net.Conn) { io.WriteString(c, clientFlags(3)+startTLS); handshake(c) })            // begins anew
	attack(20, func(c net.Conn) { io.WriteString(c, clientFlags(3)+option(99, "")[:12]); drip(c) })     // slow loris
	attack(20, func(c net.Conn) { io.WriteString(c, clientFlags(3)+hugeOption); pour(c, zeroPage[:]) }) // 4 GiB of one
	attack(5, func(c net.Conn) {
		io.WriteString(c, clientFlags(3))
		go drain(c)
		pour(c, []byte(strings.Repeat(option(optList, ""), 100))) // a million options
	})
	attack(5, func(c net.Conn) {
		io.WriteString(c, clientFlags(3)+option(optExportName, "no")) // no such export, again and again
		drain(c)
	})
	attack(40, func(c net.Conn) {
		io.WriteString(c, choose+string(call{op: cmdWrite, length: 32 << 20}.encode(1))) // of which nothing comes
		drain(c)
	})
	attack(40, func(c net.Conn) {
		io.WriteString(c, choose)
		pour(c, call{op: cmdRead, length: 1 << 20}.encode(1)) // of which nothing is taken
	})
	attack(20, func(c net.Conn) {
		io.WriteString(c, choose+string(call{op: cmdWrite, length: math.MaxUint32}.encode(1)))
		pour(c, zeroPage[:])
	})

	honest, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(honest, choose)
	io.ReadFull(honest, make([]byte, len(greeting)+10))
	c := newClient(t, honest)
	var slowest time.Duration
	var most uint64
	var many int
	for begun := time.Now(); time.Since(begun) < 3*time.Second; {
		asked := time.Now()
		c.expect(0, call{op: cmdWrite, offset: 4096, data: zeroPage[:]})
		c.expect(0, call{op: cmdRead, offset: 4096, length: 4096})
		slowest = max(slowest, time.Since(asked))
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		most, many = max(most, m.HeapInuse+m.StackInuse), max(many, runtime.NumGoroutine())
	}
	t.Logf("at most %d goroutines (bound %d) and %d MiB (bound %d), attackers included; the slowest of the honest "+
		"client's took %v", many, goroutines, most>>20, bytes>>20, slowest)
	if many > goroutines || most > bytes {
		t.Error("that is too much")
	}
	stop()
	s.Close()
	honest.Close()
	attackers.Wait()
	if err := <-served; err != server.ErrServerClosed {
		t.Error(err)
	}
}

var zeroPage [4096]byte

// hugeOption is the beginning of one that announces 4 GiB.
const hugeOption = "IHAVEOPT\x00\x00\x00\x63\xff\xff\xff\xff"

// visit connects from an address of the attackers' own, and cuts what takes longer than a while.
func visit(ctx context.Context, address string, do func(net.Conn)) {
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
	c, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	do(c)
}

func drain(c net.Conn) { io.Copy(io.Discard, c) }

// pour says the same again and again.
func pour(c net.Conn, p []byte) {
	for {
		if _, err := c.Write(p); err != nil {
			return
		}
	}
}

// drip says a byte from time to time.
func drip(c net.Conn) {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for range tick.C {
		if _, err := c.Write([]byte{0}); err != nil {
			return
		}
	}
}

func handshake(c net.Conn) {
	io.ReadFull(c, make([]byte, len(greeting)+20))
	tls.Client(c, &tls.Config{InsecureSkipVerify: true}).Handshake()
}
