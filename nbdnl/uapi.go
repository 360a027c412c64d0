package nbdnl

import (
	"time"

	"github.com/nbdctl/nbdctl/nbdnl/internal/names"
)

// Numbers of the kernel's NBD control interface. They are part of its stable ABI; the header that
// declares each is named beside it, and the kernel that brought it where that is not Linux 4.12, as
// the family itself.

const (
	familyName = "nbd" // NBD_GENL_FAMILY_NAME, linux/nbd-netlink.h
	// familyVersion is NBD_GENL_VERSION. The kernel does not look at it.
	familyVersion = 1
	// groupName is NBD_GENL_MCAST_GROUP_NAME, the group to which the kernel sends cmdLinkDead.
	groupName = "nbd_mc_group"
)

// Commands of the family: enum in linux/nbd-netlink.h.
const (
	cmdConnect     = 1 // NBD_CMD_CONNECT
	cmdDisconnect  = 2 // NBD_CMD_DISCONNECT
	cmdReconfigure = 3 // NBD_CMD_RECONFIGURE
	cmdLinkDead    = 4 // NBD_CMD_LINK_DEAD, which only the kernel sends, with nothing but an index
	cmdStatus      = 5 // NBD_CMD_STATUS
)

// Top-level attributes: enum in linux/nbd-netlink.h. All integers are in host byte order.
const (
	attrIndex             = 1  // NBD_ATTR_INDEX, u32; left out it means "any"
	attrSizeBytes         = 2  // NBD_ATTR_SIZE_BYTES, u64, bytes
	attrBlockSizeBytes    = 3  // NBD_ATTR_BLOCK_SIZE_BYTES, u64, bytes
	attrTimeout           = 4  // NBD_ATTR_TIMEOUT, u64, seconds
	attrServerFlags       = 5  // NBD_ATTR_SERVER_FLAGS, u64, NBD_FLAG_*
	attrClientFlags       = 6  // NBD_ATTR_CLIENT_FLAGS, u64, NBD_CFLAG_*
	attrSockets           = 7  // NBD_ATTR_SOCKETS, nested
	attrDeadConnTimeout   = 8  // NBD_ATTR_DEAD_CONN_TIMEOUT, u64, seconds
	attrDeviceList        = 9  // NBD_ATTR_DEVICE_LIST, nested
	attrBackendIdentifier = 10 // NBD_ATTR_BACKEND_IDENTIFIER, string, Linux 5.14
)

// Nested attributes: enums in linux/nbd-netlink.h.
const (
	attrSockItem = 1 // NBD_SOCK_ITEM, nested, inside NBD_ATTR_SOCKETS
	attrSockFD   = 1 // NBD_SOCK_FD, u32, inside NBD_SOCK_ITEM

	attrDeviceItem      = 1 // NBD_DEVICE_ITEM, nested, inside NBD_ATTR_DEVICE_LIST
	attrDeviceIndex     = 1 // NBD_DEVICE_INDEX, u32, inside NBD_DEVICE_ITEM
	attrDeviceConnected = 2 // NBD_DEVICE_CONNECTED, u8, inside NBD_DEVICE_ITEM
)

// Requests of the ioctl interface: _IO(0xab, n) in linux/nbd.h. Their numbers depend on the
// architecture (ioctlNone).
const (
	ioctlSetSock       = ioctlNone | 0xab00 // NBD_SET_SOCK, a descriptor
	ioctlSetBlockSize  = ioctlNone | 0xab01 // NBD_SET_BLKSIZE, bytes
	ioctlDoIt          = ioctlNone | 0xab03 // NBD_DO_IT
	ioctlClearSock     = ioctlNone | 0xab04 // NBD_CLEAR_SOCK
	ioctlSetSizeBlocks = ioctlNone | 0xab07 // NBD_SET_SIZE_BLOCKS
	ioctlDisconnect    = ioctlNone | 0xab08 // NBD_DISCONNECT
	ioctlSetTimeout    = ioctlNone | 0xab09 // NBD_SET_TIMEOUT, seconds
	ioctlSetFlags      = ioctlNone | 0xab0a // NBD_SET_FLAGS, NBD_FLAG_*
)

// Flags are the properties that a server promises for its export: NBD_FLAG_* of linux/nbd.h. They
// are fixed when the device is connected, a reconfigure does not change them.
type Flags uint64

// The flags that some released kernel acts upon; a kernel ignores those that it does not know.
const (
	FlagHasFlags        Flags = 1 << 0 // NBD_FLAG_HAS_FLAGS; always sent
	FlagReadOnly        Flags = 1 << 1 // NBD_FLAG_READ_ONLY
	FlagSendFlush       Flags = 1 << 2 // NBD_FLAG_SEND_FLUSH; without it fsync never reaches the server
	FlagSendFUA         Flags = 1 << 3 // NBD_FLAG_SEND_FUA; means nothing without FlagSendFlush
	FlagRotational      Flags = 1 << 4 // NBD_FLAG_ROTATIONAL, Linux 6.12
	FlagSendTrim        Flags = 1 << 5 // NBD_FLAG_SEND_TRIM
	FlagSendWriteZeroes Flags = 1 << 6 // NBD_FLAG_SEND_WRITE_ZEROES, Linux 6.12
	FlagCanMultiConn    Flags = 1 << 8 // NBD_FLAG_CAN_MULTI_CONN; a flush on one socket covers all
)

// ClientFlags say what the kernel does with the device by itself: NBD_CFLAG_* of linux/nbd.h.
type ClientFlags uint64

const (
	// DestroyOnDisconnect (NBD_CFLAG_DESTROY_ON_DISCONNECT) deletes the device with its last
	// reference. On Linux 5.10 a later connect of that index can hang all of generic netlink, so
	// that before 5.14 it is refused, and on newer kernels it fails for a while: leave it off and
	// let indexes be used again.
	DestroyOnDisconnect ClientFlags = 1 << 0
	// DisconnectOnClose (NBD_CFLAG_DISCONNECT_ON_CLOSE) disconnects when the last opener closes,
	// whoever that is: given at connect, udev's first probe ends the device. Connect without it,
	// open the device, then set it with Reconfigure. Linux 4.18.
	DisconnectOnClose ClientFlags = 1 << 1
)

// Limits that every kernel shares.
const (
	minBlockSize     = 512
	maxBlockSize     = 65536 // BLK_MAX_BLOCK_SIZE; a kernel may stop at its page size
	defaultBlockSize = 1024  // NBD_DEF_BLKSIZE

	// maxTimeout is some 24 days: the kernel keeps seconds times HZ in 32 bits.
	maxTimeout = 2_000_000 * time.Second
	maxIndex   = names.Max
	// maxSockets keeps the nested attribute far below its 16-bit length.
	maxSockets = 1024
)
