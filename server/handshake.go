package server

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"time"
)

// ErrAborted is what Handshake returns when the client ended the negotiation in order, by NBD_OPT_ABORT.
var ErrAborted = errors.New("server: the client ended the negotiation")

// Numbers of the section "Handshake phase" of the NBD protocol document.
const (
	handshakeMagic   = 0x4e42444d41474943 // NBDMAGIC, the first that a server says
	optionMagic      = 0x49484156454f5054 // IHAVEOPT
	optionReplyMagic = 0x0003e889045565a9

	flagFixedNewstyle = 1 << 0 // NBD_FLAG_FIXED_NEWSTYLE, and NBD_FLAG_C_FIXED_NEWSTYLE
	flagNoZeroes      = 1 << 1 // NBD_FLAG_NO_ZEROES, and NBD_FLAG_C_NO_ZEROES

	optExportName = 1 // NBD_OPT_EXPORT_NAME
	optAbort      = 2 // NBD_OPT_ABORT
	optList       = 3 // NBD_OPT_LIST
	optInfo       = 6 // NBD_OPT_INFO
	optGo         = 7 // NBD_OPT_GO

	repAck        = 1         // NBD_REP_ACK
	repServer     = 2         // NBD_REP_SERVER
	repInfo       = 3         // NBD_REP_INFO
	repErrUnsup   = 1<<31 + 1 // NBD_REP_ERR_UNSUP
	repErrInvalid = 1<<31 + 3 // NBD_REP_ERR_INVALID
	repErrUnknown = 1<<31 + 6 // NBD_REP_ERR_UNKNOWN
	repErrTooBig  = 1<<31 + 9 // NBD_REP_ERR_TOO_BIG

	infoExport    = 0 // NBD_INFO_EXPORT
	infoBlockSize = 3 // NBD_INFO_BLOCK_SIZE

	// maxOption is the longest option in bytes that is looked at. The longest name has 4096, and a list of what to be informed
	// of some more.
	maxOption = 8 << 10
	// exportNamePadding is what older clients get after the answer to NBD_OPT_EXPORT_NAME.
	exportNamePadding = 124
	// preferredBlock and repliesAtOnce: what a client that asks is told to use, and how much is answered in one piece.
	preferredBlock = 4 << 10
	repliesAtOnce  = 64 << 10
)

// A handshake is the negotiation with one client. It reads not one byte that belongs to what comes after.
type handshake struct {
	nc       net.Conn
	exports  map[string]*Export
	fixed    bool // the client understands replies
	noZeroes bool
	option   uint32 // being answered
	out      []byte // not sent yet
}

// Handshake negotiates with a client that has just connected, within the server's HandshakeTimeout, and returns the export that it
// wants: serve it by Export.NewConn. The deadlines of nc are used for it, and cleared afterwards. When Handshake fails, nc is of
// no further use; the error is ErrAborted if that was what the client wanted.
func (s *Server) Handshake(nc net.Conn) (*Export, error) {
	if err := nc.SetDeadline(time.Now().Add(s.handshakeTimeout())); err != nil {
		return nil, fmt.Errorf("server: handshake: %w", err)
	}
	h := handshake{nc: nc, exports: s.Exports}
	e, err := h.negotiate()
	if err == ErrAborted {
		return nil, err
	}
	if err == nil {
		err = nc.SetDeadline(time.Time{})
	}
	if err != nil {
		return nil, fmt.Errorf("server: handshake: %w", err)
	}
	return e, nil
}

func (h *handshake) negotiate() (*Export, error) {
	h.out = binary.BigEndian.AppendUint64(h.out, handshakeMagic)
	h.out = binary.BigEndian.AppendUint64(h.out, optionMagic)
	h.out = binary.BigEndian.AppendUint16(h.out, flagFixedNewstyle|flagNoZeroes)
	if err := h.send(); err != nil {
		return nil, err
	}
	var b [16]byte
	if _, err := io.ReadFull(h.nc, b[:4]); err != nil {
		return nil, fmt.Errorf("client flags: %w", err)
	}
	flags := binary.BigEndian.Uint32(b[:])
	if flags&^(flagFixedNewstyle|flagNoZeroes) != 0 {
		return nil, fmt.Errorf("client flags %#x: some of them were not offered", flags)
	}
	h.fixed, h.noZeroes = flags&flagFixedNewstyle != 0, flags&flagNoZeroes != 0
	for {
		if _, err := io.ReadFull(h.nc, b[:]); err != nil {
			return nil, fmt.Errorf("option: %w", err)
		}
		if magic := binary.BigEndian.Uint64(b[:]); magic != optionMagic {
			return nil, fmt.Errorf("option magic %#016x, want %#016x: the stream is out of step", magic, uint64(optionMagic))
		}
		h.option = binary.BigEndian.Uint32(b[8:])
		e, err := h.answer(binary.BigEndian.Uint32(b[12:]))
		if sent := h.send(); err == nil {
			err = sent
		}
		if e != nil || err != nil {
			return e, err
		}
	}
}

// answer reads the data of an option and prepares the reply. An export ends the negotiation, an error too.
func (h *handshake) answer(length uint32) (*Export, error) {
	if h.option != optExportName && !h.fixed {
		return nil, fmt.Errorf("option %d from a client that understands no replies", h.option)
	}
	if length > maxOption {
		if h.option == optExportName {
			return nil, fmt.Errorf("an export name of %d bytes", length)
		}
		// Skipped, so that the next option is found behind it. Time bounds it, and no memory is taken.
		if _, err := io.CopyN(io.Discard, h.nc, int64(length)); err != nil {
			return nil, fmt.Errorf("data of option %d: %w", h.option, err)
		}
		h.refuse(repErrTooBig, "option too long")
		return nil, nil
	}
	data := make([]byte, length)
	if _, err := io.ReadFull(h.nc, data); err != nil {
		return nil, fmt.Errorf("data of option %d: %w", h.option, err)
	}
	switch h.option {
	case optExportName:
		return h.exportName(string(data))
	case optAbort:
		h.reply(repAck, nil)
		return nil, ErrAborted
	case optList:
		return nil, h.list(data)
	case optInfo, optGo:
		return h.info(data), nil
	default:
		h.refuse(repErrUnsup, "option not supported")
		return nil, nil
	}
}

// exportName answers NBD_OPT_EXPORT_NAME, which knows no way to refuse but to hang up.
func (h *handshake) exportName(name string) (*Export, error) {
	e := h.exports[name]
	if e == nil {
		return nil, fmt.Errorf("no export %q", name)
	}
	h.out = binary.BigEndian.AppendUint64(h.out, uint64(e.size.Load()))
	h.out = binary.BigEndian.AppendUint16(h.out, uint16(e.flags))
	if !h.noZeroes {
		h.out = append(h.out, make([]byte, exportNamePadding)...)
	}
	return e, nil
}

// list answers NBD_OPT_LIST, in the order of the names.
func (h *handshake) list(data []byte) error {
	if len(data) > 0 {
		h.refuse(repErrInvalid, "NBD_OPT_LIST takes no data")
		return nil
	}
	for _, name := range slices.Sorted(maps.Keys(h.exports)) {
		h.reply(repServer, append(binary.BigEndian.AppendUint32(nil, uint32(len(name))), name...))
		if len(h.out) > repliesAtOnce {
			if err := h.send(); err != nil {
				return err
			}
		}
	}
	h.reply(repAck, nil)
	return nil
}

// info answers NBD_OPT_INFO and NBD_OPT_GO, and returns the export if the client goes.
func (h *handshake) info(data []byte) *Export {
	name, asked, ok := parseInfo(data)
	if !ok {
		h.refuse(repErrInvalid, "malformed data")
		return nil
	}
	e := h.exports[name]
	if e == nil {
		h.refuse(repErrUnknown, "no such export")
		return nil
	}
	b := binary.BigEndian.AppendUint16(nil, infoExport)
	b = binary.BigEndian.AppendUint64(b, uint64(e.size.Load()))
	h.reply(repInfo, binary.BigEndian.AppendUint16(b, uint16(e.flags)))
	if asked || e.blockSize > 1 {
		b = binary.BigEndian.AppendUint16(b[:0], infoBlockSize)
		b = binary.BigEndian.AppendUint32(b, uint32(e.blockSize))
		b = binary.BigEndian.AppendUint32(b, uint32(max(e.blockSize, e.preferred, preferredBlock)))
		h.reply(repInfo, binary.BigEndian.AppendUint32(b, e.maxLength))
	}
	h.reply(repAck, nil)
	if h.option == optInfo {
		return nil
	}
	return e
}

// parseInfo takes the data of NBD_OPT_INFO and NBD_OPT_GO apart: length and name of the export, number and types of what the
// client asks to be informed of, among them maybe the block sizes.
func parseInfo(data []byte) (name string, blockSizes, ok bool) {
	if len(data) < 4 {
		return "", false, false
	}
	n := binary.BigEndian.Uint32(data)
	data = data[4:]
	if len(data) < 2 || uint64(n) > uint64(len(data)-2) {
		return "", false, false
	}
	name, data = string(data[:n]), data[n:]
	count := int(binary.BigEndian.Uint16(data))
	data = data[2:]
	if len(data) != 2*count {
		return "", false, false
	}
	for ; len(data) > 0; data = data[2:] {
		blockSizes = blockSizes || binary.BigEndian.Uint16(data) == infoBlockSize
	}
	return name, blockSizes, true
}

// refuse replies with an error, and a text that a client may show.
func (h *handshake) refuse(code uint32, why string) { h.reply(code, []byte(why)) }

func (h *handshake) reply(code uint32, data []byte) {
	h.out = binary.BigEndian.AppendUint64(h.out, optionReplyMagic)
	h.out = binary.BigEndian.AppendUint32(h.out, h.option)
	h.out = binary.BigEndian.AppendUint32(h.out, code)
	h.out = binary.BigEndian.AppendUint32(h.out, uint32(len(data)))
	h.out = append(h.out, data...)
}

// send sends what is waiting to be.
func (h *handshake) send() error {
	if len(h.out) == 0 {
		return nil
	}
	_, err := h.nc.Write(h.out)
	h.out = h.out[:0]
	return err
}
