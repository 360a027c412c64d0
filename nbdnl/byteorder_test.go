package nbdnl

import (
	"bytes"
	"encoding/binary"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/mdlayher/genetlink"
)

// The messages of one connect, byte by byte, as machines of both orders write and read them. Each
// machine tests its own; make test-unit has one of the other order.
var vectors = map[string]struct{ connect, index, status []byte }{
	"little": {
		connect: []byte{
			8, 0, 1, 0, 3, 0, 0, 0, // index
			12, 0, 2, 0, 0, 0, 0, 0, 0, 1, 0, 0, // size
			12, 0, 3, 0, 0, 16, 0, 0, 0, 0, 0, 0, // block size
			12, 0, 4, 0, 30, 0, 0, 0, 0, 0, 0, 0, // timeout
			12, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, // dead connection timeout
			12, 0, 5, 0, 5, 1, 0, 0, 0, 0, 0, 0, // server flags
			16, 0, 7, 0x80, 12, 0, 1, 0x80, 8, 0, 1, 0, 0xf7, 2, 0, 0, // sockets
			8, 0, 10, 0, 'a', ':', 'b', 0, // identifier
		},
		index:  []byte{8, 0, 1, 0, 1, 2, 0, 0},
		status: []byte{24, 0, 9, 0, 20, 0, 1, 0, 8, 0, 1, 0, 1, 2, 0, 0, 5, 0, 2, 0, 1, 0, 0, 0},
	},
	"big": {
		connect: []byte{
			0, 8, 0, 1, 0, 0, 0, 3,
			0, 12, 0, 2, 0, 0, 1, 0, 0, 0, 0, 0,
			0, 12, 0, 3, 0, 0, 0, 0, 0, 0, 16, 0,
			0, 12, 0, 4, 0, 0, 0, 0, 0, 0, 0, 30,
			0, 12, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0,
			0, 12, 0, 5, 0, 0, 0, 0, 0, 0, 1, 5,
			0, 16, 0x80, 7, 0, 12, 0x80, 1, 0, 8, 0, 1, 0, 0, 2, 0xf7,
			0, 8, 0, 10, 'a', ':', 'b', 0,
		},
		index:  []byte{0, 8, 0, 1, 0, 0, 2, 1},
		status: []byte{0, 24, 0, 9, 0, 20, 0, 1, 0, 8, 0, 1, 0, 0, 2, 1, 0, 5, 0, 2, 1, 0, 0, 0},
	},
}

func TestByteOrder(t *testing.T) {
	order := "little"
	if bytes.Equal(binary.NativeEndian.AppendUint16(nil, 1), []byte{0, 1}) {
		order = "big"
	}
	t.Logf("this machine has %s-endian numbers", order)
	v := vectors[order]
	cfg := &Config{
		Size:       1 << 40,
		BlockSize:  4096,
		Flags:      FlagSendFlush | FlagCanMultiConn,
		Timeout:    30 * time.Second,
		Identifier: "a:b",
	}
	got, err := encodeConnect(3, cfg, []int{759})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(v.connect, got); diff != "" {
		t.Errorf("connect (-want +got):\n%s", diff)
	}
	if index, err := decodeIndex(v.index); err != nil || index != 513 {
		t.Errorf("the kernel's answer is %d, %v, want 513", index, err)
	}
	linkDead := genetlink.Message{Header: genetlink.Header{Command: cmdLinkDead}, Data: v.index}
	if index, ok := decodeLinkDead(linkDead); !ok || index != 513 {
		t.Errorf("the dead link is of %d, want 513", index)
	}
	devices, err := decodeStatus(v.status)
	if err != nil || len(devices) != 1 || devices[0].index != 513 || !devices[0].configured {
		t.Errorf("the status is %+v, %v, want that of 513", devices, err)
	}
}
