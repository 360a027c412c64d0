package main

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync"
)

// Of the NBD protocol's simple replies.
const (
	requestMagic = 0x25609513
	replyMagic   = 0x67446698
	requestSize  = 28
	replySize    = 16

	cmdRead  = 0
	cmdWrite = 1
	cmdDisc  = 2

	errIO = 5
)

// transmit executes each request on a goroutine of its own. It is what a slow backend is measured
// against, and has no other merit.
func transmit(nc net.Conn, b readerWriterAt) error {
	var (
		in      = bufio.NewReaderSize(nc, 64<<10)
		sending sync.Mutex // guards writes to nc
		running sync.WaitGroup
		head    [requestSize]byte
	)
	defer running.Wait()
	for {
		if _, err := io.ReadFull(in, head[:]); err != nil {
			return err
		}
		if binary.BigEndian.Uint32(head[:]) != requestMagic {
			return fmt.Errorf("goserver: request with magic %x", head[:4])
		}
		command := binary.BigEndian.Uint16(head[6:])
		offset := int64(binary.BigEndian.Uint64(head[16:]))
		length := binary.BigEndian.Uint32(head[24:])
		if command == cmdDisc {
			return nil
		}
		buf := make([]byte, replySize+int(length))
		binary.BigEndian.PutUint32(buf, replyMagic)
		copy(buf[8:], head[8:16])
		if command == cmdWrite {
			if _, err := io.ReadFull(in, buf[replySize:]); err != nil {
				return err
			}
		}
		running.Go(func() {
			reply := execute(b, command, buf, offset)
			sending.Lock()
			defer sending.Unlock()
			_, _ = nc.Write(reply) // The next read fails too.
		})
	}
}

// execute returns the reply, which is in buf, as is the payload.
func execute(b readerWriterAt, command uint16, buf []byte, offset int64) []byte {
	var err error
	switch command {
	case cmdRead:
		if _, err = b.ReadAt(buf[replySize:], offset); err == nil {
			return buf
		}
	case cmdWrite:
		_, err = b.WriteAt(buf[replySize:], offset)
	}
	if err != nil {
		binary.BigEndian.PutUint32(buf[4:], errIO)
	}
	return buf[:replySize]
}
