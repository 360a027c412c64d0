package server_test

import (
	"math"
	"net"
	"runtime"
	"testing"

	"github.com/nbdctl/nbdctl/server"
)

// TestIdleMemory holds what a connection costs that has been busy and now waits, with nothing or
// with half a header received.
func TestIdleMemory(t *testing.T) {
	const (
		connections = 64
		bound       = 64 << 10 // bytes for each, by design
	)
	if raceEnabled {
		t.Skip("the race detector has memory of its own")
	}
	e := export(t, &referring{data: make([]byte, 1<<20)}, server.Options{})
	results := make(chan error, connections)
	before := inUse()
	var clients []net.Conn
	for range connections {
		ours, theirs := socketpair(t)
		conn := e.NewConn(theirs, nil)
		go func() { results <- conn.Transmit() }()
		clients = append(clients, ours)
		for _, q := range []call{{op: cmdRead, length: 128 << 10}, {op: cmdWrite, data: make([]byte, 128<<10)},
			{op: cmdRead, length: 512}} {
			newLean(ours, q).do(t)
		}
	}
	for _, partial := range []int{0, 14} {
		for _, nc := range clients {
			if _, err := nc.Write(make([]byte, partial)); err != nil {
				t.Fatal(err)
			}
		}
		each := (inUse() - before) / connections
		t.Logf("%d bytes for each connection with %d bytes of a header", each, partial)
		if each > bound {
			t.Errorf("%d bytes for each idle connection, with %d bytes of a header", each, partial)
		}
	}
	for _, nc := range clients {
		nc.Close()
	}
	for range clients {
		checkError(t, <-results, errAny)
	}
}

// inUse returns the bytes of heap and stacks that are in use once the pools are emptied, as they
// are in two collections, and what earlier tests have left is gone, which may take some more.
func inUse() int64 {
	least := int64(math.MaxInt64)
	for same := 0; same < 3; {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		if n := int64(m.HeapInuse + m.StackInuse); n < least {
			least, same = n, 0
		} else {
			same++
		}
	}
	return least
}
