package nbdnl

import (
	"errors"
	"fmt"
	"time"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
)

// The messages of the family, to and from bytes. Nothing here touches the kernel.

// anyIndex leaves the choice of the index to the kernel.
const anyIndex = -1

// encodeConnect returns the attributes of NBD_CMD_CONNECT. fds are the sockets' descriptors in the
// calling process.
func encodeConnect(index int, cfg *Config, fds []int) ([]byte, error) {
	ae := netlink.NewAttributeEncoder()
	if index != anyIndex {
		ae.Uint32(attrIndex, uint32(index))
	}
	ae.Uint64(attrSizeBytes, uint64(cfg.Size))
	ae.Uint64(attrBlockSizeBytes, uint64(cfg.blockSize()))
	// Both are sent even when 0: nbd_genl_connect leaves the block layer's timer of the index's
	// former user in force when the timeout is absent.
	ae.Uint64(attrTimeout, seconds(cfg.Timeout))
	ae.Uint64(attrDeadConnTimeout, seconds(cfg.DeadConnTimeout))
	ae.Uint64(attrServerFlags, uint64(cfg.Flags|FlagHasFlags))
	if cfg.ClientFlags != 0 {
		ae.Uint64(attrClientFlags, uint64(cfg.ClientFlags))
	}
	encodeSockets(ae, fds)
	if cfg.Identifier != "" {
		ae.String(attrBackendIdentifier, cfg.Identifier)
	}
	return ae.Encode()
}

// encodeReconfigure returns the attributes of NBD_CMD_RECONFIGURE.
func encodeReconfigure(index int, identifier string, u *Update, fds []int) ([]byte, error) {
	ae := netlink.NewAttributeEncoder()
	ae.Uint32(attrIndex, uint32(index))
	if identifier != "" {
		// The kernel refuses a reconfigure that does not repeat the identifier of the connect.
		ae.String(attrBackendIdentifier, identifier)
	}
	if u.Size != nil {
		ae.Uint64(attrSizeBytes, uint64(*u.Size))
	}
	if u.BlockSize != nil {
		ae.Uint64(attrBlockSizeBytes, uint64(*u.BlockSize))
	}
	if u.Timeout != nil {
		ae.Uint64(attrTimeout, seconds(*u.Timeout))
	}
	if u.DeadConnTimeout != nil {
		ae.Uint64(attrDeadConnTimeout, seconds(*u.DeadConnTimeout))
	}
	if u.ClientFlags != nil {
		ae.Uint64(attrClientFlags, uint64(*u.ClientFlags))
	}
	if len(fds) > 0 {
		encodeSockets(ae, fds)
	}
	return ae.Encode()
}

// encodeIndex returns the attributes of NBD_CMD_DISCONNECT and NBD_CMD_STATUS.
func encodeIndex(index int) ([]byte, error) {
	ae := netlink.NewAttributeEncoder()
	ae.Uint32(attrIndex, uint32(index))
	return ae.Encode()
}

func encodeSockets(ae *netlink.AttributeEncoder, fds []int) {
	ae.Nested(attrSockets, func(list *netlink.AttributeEncoder) error {
		for _, fd := range fds {
			list.Nested(attrSockItem, func(item *netlink.AttributeEncoder) error {
				item.Uint32(attrSockFD, uint32(fd))
				return nil
			})
		}
		return nil
	})
}

func seconds(d time.Duration) uint64 { return uint64(d / time.Second) }

// errNoIndex is a reply that lacks what every kernel puts into it.
var errNoIndex = errors.New("reply without a device index")

// decodeIndex returns the index in the reply to NBD_CMD_CONNECT.
func decodeIndex(b []byte) (int, error) {
	ad, err := netlink.NewAttributeDecoder(b)
	if err != nil {
		return 0, err
	}
	index := int64(-1)
	for ad.Next() {
		if ad.Type() == attrIndex {
			index = int64(ad.Uint32())
		}
	}
	if err := ad.Err(); err != nil {
		return 0, err
	}
	return checkIndex(index)
}

// decodeLinkDead returns the index in NBD_CMD_LINK_DEAD; ok is false for any other message.
func decodeLinkDead(m genetlink.Message) (index int, ok bool) {
	if m.Header.Command != cmdLinkDead {
		return 0, false
	}
	index, err := decodeIndex(m.Data)
	return index, err == nil
}

// A deviceStatus is one device in the reply to NBD_CMD_STATUS.
type deviceStatus struct {
	index int
	// configured is the kernel's "connected", which is true as well of a device that somebody
	// merely has open, and of one that is disconnected but not released (populate_nbd_status looks
	// at config_refs).
	configured bool
}

// decodeStatus returns the devices in the reply to NBD_CMD_STATUS: none for an index that does not
// exist. A list of more than 3276 devices overflows its 16-bit length in the kernel, so that only
// the reply to a question for one index can be trusted.
func decodeStatus(b []byte) ([]deviceStatus, error) {
	ad, err := netlink.NewAttributeDecoder(b)
	if err != nil {
		return nil, err
	}
	var devices []deviceStatus
	for ad.Next() {
		if ad.Type() != attrDeviceList {
			continue
		}
		ad.Nested(func(list *netlink.AttributeDecoder) error {
			for list.Next() {
				if list.Type() != attrDeviceItem {
					continue
				}
				list.Nested(func(item *netlink.AttributeDecoder) error {
					d, err := decodeDevice(item)
					devices = append(devices, d)
					return err
				})
			}
			return nil
		})
	}
	return devices, ad.Err()
}

func decodeDevice(item *netlink.AttributeDecoder) (deviceStatus, error) {
	index, configured := int64(-1), false
	for item.Next() {
		switch item.Type() {
		case attrDeviceIndex:
			index = int64(item.Uint32())
		case attrDeviceConnected:
			configured = item.Uint8() != 0
		}
	}
	if err := item.Err(); err != nil {
		return deviceStatus{}, err
	}
	i, err := checkIndex(index)
	return deviceStatus{index: i, configured: configured}, err
}

// checkIndex refuses what no device can have, so that what follows may compute with it.
func checkIndex(index int64) (int, error) {
	if index < 0 {
		return 0, errNoIndex
	}
	if index > maxIndex {
		return 0, fmt.Errorf("reply with device index %d, beyond any device", index)
	}
	return int(index), nil
}
