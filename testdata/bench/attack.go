package main

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

const (
	greetingSize   = 18
	connectsPerSec = 500
	tlsPerSec      = 100
	slow, hungry   = 50, 50 // how many of each keep a connection, as far as they may
)

// attackers are what a server on the Internet meets. They are as many in a second as the processor
// that they have to themselves bears, and do not fight for it.
type attackers struct {
	address string
	knocks  atomic.Int64   // connections that came and went
	secured atomic.Int64   // TLS handshakes
	cut     atomic.Int64   // connections that the server has ended
	trying  sync.WaitGroup // of those that keep connections: they have tried to get one
}

// attackUntil attacks the server at an address until stdin ends, and tells what it did.
func attackUntil(address string, in io.Reader, ready io.Writer, summary io.Writer) error {
	a := &attackers{address: address}
	go a.often(connectsPerSec, a.knock)
	go a.often(tlsPerSec, a.handshake)
	a.trying.Add(slow + 2*hungry)
	for range slow {
		go a.again(a.loris)
	}
	for range hungry {
		go a.again(a.announce)
		go a.again(a.refuse)
	}
	begun := time.Now()
	a.trying.Wait()
	if _, err := ready.Write([]byte("\n")); err != nil {
		return err
	}
	_, err := io.Copy(io.Discard, in)
	took := time.Since(begun).Seconds()
	fmt.Fprintf(summary, "attackers: %.0f connections and %.0f TLS handshakes a second, %d connections cut\n",
		float64(a.knocks.Load())/took, float64(a.secured.Load())/took, a.cut.Load())
	return err
}

func (a *attackers) often(rate int, do func()) {
	for range time.Tick(time.Second / time.Duration(rate)) {
		go do()
	}
}

// again connects again and again, not much faster than the server cuts.
func (a *attackers) again(do func(net.Conn)) {
	first := true
	for range time.Tick(200 * time.Millisecond) {
		nc := a.dial()
		if first {
			a.trying.Done()
			first = false
		}
		if nc != nil {
			do(nc)
			a.cut.Add(1)
			nc.Close()
		}
	}
}

// dial connects from an address that is not the honest client's; nil: in vain.
func (a *attackers) dial() net.Conn {
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}, Timeout: time.Second}
	nc, err := d.Dial("tcp", a.address)
	if err != nil {
		return nil
	}
	return nc
}

func option(number, length uint32, data ...byte) []byte {
	b := binary.BigEndian.AppendUint32([]byte("IHAVEOPT"), number)
	return append(binary.BigEndian.AppendUint32(b, length), data...)
}

var hello = []byte{0, 0, 0, 3}

func (a *attackers) knock() {
	if nc := a.dial(); nc != nil {
		nc.Close()
		a.knocks.Add(1)
	}
}

func (a *attackers) handshake() {
	nc := a.dial()
	if nc == nil {
		return
	}
	defer nc.Close()
	nc.SetDeadline(time.Now().Add(5 * time.Second))
	nc.Write(append(hello, option(5, 0)...))
	if _, err := io.ReadFull(nc, make([]byte, greetingSize+20)); err != nil {
		return
	}
	if tls.Client(nc, &tls.Config{InsecureSkipVerify: true}).Handshake() == nil {
		a.secured.Add(1)
	}
}

// loris says a byte of an endless option from time to time.
func (a *attackers) loris(nc net.Conn) {
	nc.Write(append(hello, option(99, 1<<32-1)...))
	for range time.Tick(100 * time.Millisecond) {
		if _, err := nc.Write([]byte{0}); err != nil {
			return
		}
	}
}

// announce chooses the export, and announces writes of which nothing comes.
func (a *attackers) announce(nc net.Conn) {
	nc.Write(append(hello, option(1, 0)...))
	write := make([]byte, 28)
	binary.BigEndian.PutUint32(write, 0x25609513)
	write[7] = 1
	binary.BigEndian.PutUint32(write[24:], 32<<20)
	nc.Write(write)
	io.Copy(io.Discard, nc)
}

// refuse asks for large reads, and takes nothing of them.
func (a *attackers) refuse(nc net.Conn) {
	nc.Write(append(hello, option(1, 0)...))
	read := make([]byte, 28)
	binary.BigEndian.PutUint32(read, 0x25609513)
	binary.BigEndian.PutUint32(read[24:], 1<<20)
	many := bytes.Repeat(read, 1000)
	for {
		if _, err := nc.Write(many); err != nil {
			return
		}
	}
}

// attackHere is the part of the program that attacks.
func attackHere(address string) error { return attackUntil(address, os.Stdin, os.Stdout, os.Stderr) }
