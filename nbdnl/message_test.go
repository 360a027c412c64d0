package nbdnl

import (
	"encoding/binary"
	"errors"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/mdlayher/genetlink"
)

// attr builds an attribute as linux/netlink.h lays it out: length and type of 16 bits each in host
// byte order, then the payload, filled up to four bytes.
func attr(typ uint16, payload ...[]byte) []byte {
	var data []byte
	for _, p := range payload {
		data = append(data, p...)
	}
	b := binary.NativeEndian.AppendUint16(nil, uint16(4+len(data)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = append(b, data...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

func u32(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }
func u64(v uint64) []byte { return binary.NativeEndian.AppendUint64(nil, v) }

func join(parts ...[]byte) []byte {
	var b []byte
	for _, p := range parts {
		b = append(b, p...)
	}
	return b
}

const nested = 0x8000 // NLA_F_NESTED

func TestEncodeConnect(t *testing.T) {
	tests := []struct {
		name  string
		index int
		cfg   Config
		fds   []int
		want  []byte
	}{
		{
			name: "defaults", index: anyIndex, cfg: Config{Size: 1 << 20}, fds: []int{7},
			want: join(
				attr(2, u64(1<<20)), attr(3, u64(1024)), attr(4, u64(0)), attr(8, u64(0)), attr(5, u64(1)),
				attr(7|nested, attr(1|nested, attr(1, u32(7)))),
			),
		},
		{
			name: "everything", index: 3, fds: []int{7, 8},
			cfg: Config{
				Size: 1 << 40, BlockSize: 4096, Flags: FlagSendFlush | FlagCanMultiConn, ClientFlags: DisconnectOnClose,
				Timeout: 30 * time.Second, DeadConnTimeout: 2 * time.Minute, Identifier: "a:b",
			},
			want: join(
				attr(1, u32(3)),
				attr(2, u64(1<<40)), attr(3, u64(4096)), attr(4, u64(30)), attr(8, u64(120)), attr(5, u64(1|4|256)),
				attr(6, u64(2)),
				attr(7|nested, attr(1|nested, attr(1, u32(7))), attr(1|nested, attr(1, u32(8)))),
				attr(10, []byte("a:b\x00")),
			),
		},
		{
			name: "index 0 is one", index: 0, cfg: Config{Size: 512, BlockSize: 512}, fds: []int{7},
			want: join(
				attr(1, u32(0)),
				attr(2, u64(512)), attr(3, u64(512)), attr(4, u64(0)), attr(8, u64(0)), attr(5, u64(1)),
				attr(7|nested, attr(1|nested, attr(1, u32(7)))),
			),
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := encodeConnect(tt.index, &tt.cfg, tt.fds)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("attributes (-want +got):\n%s", diff)
			}
		})
	}
}

func TestEncodeReconfigure(t *testing.T) {
	size, block, timeout, dead, flags := int64(4096), 4096, 9*time.Second, time.Duration(0), ClientFlags(0)
	tests := []struct {
		name       string
		identifier string
		update     Update
		fds        []int
		want       []byte
	}{
		{name: "nothing", want: attr(1, u32(5))},
		{
			name: "settings", identifier: "x:y",
			update: Update{
				Size:            &size,
				BlockSize:       &block,
				Timeout:         &timeout,
				DeadConnTimeout: &dead,
				ClientFlags:     &flags,
			},
			want: join(attr(1, u32(5)), attr(10, []byte("x:y\x00")),
				attr(2, u64(4096)), attr(3, u64(4096)), attr(4, u64(9)), attr(8, u64(0)), attr(6, u64(0))),
		},
		{
			name: "sockets", fds: []int{9},
			want: join(attr(1, u32(5)), attr(7|nested, attr(1|nested, attr(1, u32(9))))),
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := encodeReconfigure(5, tt.identifier, &tt.update, tt.fds)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("attributes (-want +got):\n%s", diff)
			}
		})
	}
}

func TestDecodeIndex(t *testing.T) {
	tests := []struct {
		name string
		in   []byte
		want int
		err  string
	}{
		{name: "the kernel's reply", in: attr(1, u32(12)), want: 12},
		{name: "unknown attributes", in: join(attr(77, u64(1)), attr(1, u32(2))), want: 2},
		{name: "empty", err: "without a device index"},
		{name: "other attributes only", in: attr(2, u64(1)), err: "without a device index"},
		{name: "wrong width", in: attr(1, u64(1)), err: "not a uint32"},
		{name: "beyond any device", in: attr(1, u32(0xffffffff)), err: "beyond any device"},
		{name: "cut off", in: attr(1, u32(1))[:6], err: "length"},
		{name: "less than a header", in: []byte{8}, err: "length"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := decodeIndex(tt.in)
			if got != tt.want || (err == nil) != (tt.err == "") {
				t.Fatalf("got %d, %v, want %d and an error with %q", got, err, tt.want, tt.err)
			}
			if err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Errorf("error is %v, want one with %q", err, tt.err)
			}
		})
	}
}

func TestDecodeLinkDead(t *testing.T) {
	tests := []struct {
		name    string
		command uint8
		version uint8
		data    []byte
		want    int
		ok      bool
	}{
		{"the kernel's message", 4, 1, attr(1, u32(3)), 3, true},
		{"another command", 5, 1, attr(1, u32(3)), 0, false},
		{"no index", 4, 1, nil, 0, false},
		{"beyond any device", 4, 0, attr(1, u32(0xffffffff)), 0, false},
		{"cut off", 4, 0, attr(1, u32(3))[:6], 0, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			in := genetlink.Message{
				Header: genetlink.Header{Command: tt.command, Version: tt.version},
				Data:   tt.data,
			}
			if got, ok := decodeLinkDead(in); got != tt.want || ok != tt.ok {
				t.Errorf("got %d, %t, want %d, %t", got, ok, tt.want, tt.ok)
			}
		})
	}
}

func TestDecodeStatus(t *testing.T) {
	item := func(index uint32, connected byte) []byte {
		return attr(1, attr(1, u32(index)), attr(2, []byte{connected}))
	}
	tests := []struct {
		name string
		in   []byte
		want []deviceStatus
		err  bool
	}{
		{name: "no such device", in: attr(9)},
		{name: "one", in: attr(9, item(3, 1)), want: []deviceStatus{{3, true}}},
		{name: "several", in: attr(9, item(0, 0), item(1, 1)), want: []deviceStatus{{0, false}, {1, true}}},
		{
			name: "nested bits",
			in:   attr(9|nested, attr(1|nested, attr(1, u32(3)), attr(2, []byte{1}))),
			want: []deviceStatus{{3, true}},
		},
		{
			name: "unknown attributes",
			in:   join(attr(5, u64(3)), attr(9, attr(8, u32(1)), item(3, 1))),
			want: []deviceStatus{{3, true}},
		},
		{name: "no index", in: attr(9, attr(1, attr(2, []byte{1}))), err: true},
		{name: "connected of four bytes", in: attr(9, attr(1, attr(1, u32(1)), attr(2, u32(1)))), err: true},
		{name: "cut off", in: attr(9, item(3, 1))[:14], err: true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := decodeStatus(tt.in)
			if (err != nil) != tt.err {
				t.Fatalf("error is %v", err)
			}
			if err != nil {
				return
			}
			if diff := cmp.Diff(tt.want, got, cmp.AllowUnexported(deviceStatus{})); diff != "" {
				t.Errorf("devices (-want +got):\n%s", diff)
			}
		})
	}
}

// What the decoders accept must make sense, whatever the bytes.

func FuzzDecodeIndex(f *testing.F) {
	f.Add(attr(1, u32(12)))
	f.Add(join(attr(77, u64(1)), attr(1, u32(2))))
	f.Add(attr(1, u32(0xffffffff)))
	f.Fuzz(func(t *testing.T, b []byte) {
		index, err := decodeIndex(b)
		if err == nil && (index < 0 || index > maxIndex) {
			t.Errorf("index %d", index)
		}
	})
}

func FuzzDecodeStatus(f *testing.F) {
	f.Add(attr(9, attr(1, attr(1, u32(3)), attr(2, []byte{1}))))
	f.Add(attr(9|nested, attr(1|nested, attr(1, u32(3)), attr(2, []byte{1})), attr(1)))
	f.Fuzz(func(t *testing.T, b []byte) {
		devices, err := decodeStatus(b)
		if err != nil {
			return
		}
		if 8*len(devices) > len(b) {
			t.Errorf("%d devices in %d bytes", len(devices), len(b))
		}
		for _, d := range devices {
			if d.index < 0 || d.index > maxIndex {
				t.Errorf("index %d", d.index)
			}
		}
	})
}

func FuzzDecodeLinkDead(f *testing.F) {
	f.Add(join([]byte{4, 1, 0, 0}, attr(1, u32(3))))
	f.Add(join([]byte{5, 1, 0, 0}, attr(1, u32(3))))
	f.Add(join([]byte{4, 1, 0, 0}, attr(1, u32(0xffffffff))))
	f.Fuzz(func(t *testing.T, b []byte) {
		var m genetlink.Message
		if m.UnmarshalBinary(b) != nil {
			return
		}
		index, ok := decodeLinkDead(m)
		if index < 0 || index > maxIndex || !ok && index != 0 {
			t.Errorf("index %d, %t", index, ok)
		}
	})
}

func FuzzParseUevent(f *testing.F) {
	f.Add([]byte("change@/devices/virtual/block/nbd3\x00" +
		"ACTION=change\x00SUBSYSTEM=block\x00DEVNAME=nbd3\x00SEQNUM=12\x00"))
	f.Add([]byte("libudev\x00\xfe\xed\xca\xfe"))
	f.Fuzz(func(t *testing.T, b []byte) {
		e := parseUevent(b)
		if strings.ContainsRune(e.device+e.action, 0) || len(e.device)+len(e.action) > len(b) {
			t.Errorf("%+v of %q", e, b)
		}
	})
}

func TestParseUevent(t *testing.T) {
	tests := []struct {
		in   string
		want uevent
	}{
		{
			"change@/devices/virtual/block/nbd3\x00ACTION=change\x00DEVNAME=nbd3\x00DEVTYPE=disk\x00",
			uevent{"change", "nbd3"},
		},
		{"add@/devices/virtual/net/x\x00ACTION=add\x00SUBSYSTEM=net\x00", uevent{action: "add"}},
		{"libudev\x00\xfe\xed\xca\xfe\x28DEVNAME=nbd3\x00", uevent{}},
		{"", uevent{}},
		{"change@/x\x00DEVNAME\x00=nbd3\x00DEVNAME=", uevent{}},
	}
	for _, tt := range tests {
		if got := parseUevent([]byte(tt.in)); got != tt.want {
			t.Errorf("%q is %+v, want %+v", tt.in, got, tt.want)
		}
	}
}

func TestErrorIs(t *testing.T) {
	tests := []struct {
		err    error
		target error
		want   bool
	}{
		{newError("connect", 3, syscall.EBUSY), ErrBusy, true},
		{newError("connect", 3, syscall.EBUSY), syscall.EEXIST, false},
		{newError("connect", 3, &BusyError{Index: 3}), ErrBusy, true},
		{newError("connect", 3, syscall.EINVAL), ErrBusy, false},
		{newError("connect", 3, syscall.EOPNOTSUPP), errors.ErrUnsupported, true},
		{newError("connect", 3, ErrNotOwner), ErrNotOwner, true},
		{newError("connect", 3, ErrNotOwner), ErrBusy, false},
	}
	for _, tt := range tests {
		if got := errors.Is(tt.err, tt.target); got != tt.want {
			t.Errorf("%q matches %q: %t", tt.err, tt.target, got)
		}
	}
	if err := newError("connect", 3, nil); err != nil {
		t.Errorf("no error became %v", err)
	}
}
