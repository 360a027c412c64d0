package nbdnltest

// The control interface's numbers (linux/nbd-netlink.h, linux/nbd.h), written down a second time: a
// slip in those of package nbdnl must not be repeated by the kernel that checks it.

// A Command is one of the family's.
type Command uint8

// The commands that user space gives.
const (
	Connect     Command = 1
	Disconnect  Command = 2
	Reconfigure Command = 3
	Status      Command = 5
)

// Requests of the ioctl interface, on the architectures where the tests run.
const (
	nbdSetSock       = 0xab00
	nbdSetBlockSize  = 0xab01
	nbdDoIt          = 0xab03
	nbdClearSock     = 0xab04
	nbdSetSizeBlocks = 0xab07
	nbdDisconnect    = 0xab08
	nbdSetTimeout    = 0xab09
	nbdSetFlags      = 0xab0a
)

const (
	genlVersion = 1

	nbdCmdLinkDead = 4

	nbdAttrIndex             = 1
	nbdAttrSizeBytes         = 2
	nbdAttrBlockSizeBytes    = 3
	nbdAttrTimeout           = 4
	nbdAttrServerFlags       = 5
	nbdAttrClientFlags       = 6
	nbdAttrSockets           = 7
	nbdAttrDeadConnTimeout   = 8
	nbdAttrDeviceList        = 9
	nbdAttrBackendIdentifier = 10

	nbdSockItem        = 1
	nbdSockFD          = 1
	nbdDeviceItem      = 1
	nbdDeviceIndex     = 1
	nbdDeviceConnected = 2

	nbdFlagReadOnly        = 1 << 1
	nbdFlagSendFlush       = 1 << 2
	nbdFlagSendFUA         = 1 << 3
	nbdFlagRotational      = 1 << 4
	nbdFlagSendTrim        = 1 << 5
	nbdFlagSendWriteZeroes = 1 << 6
	nbdFlagCanMultiConn    = 1 << 8

	nbdDefaultBlockSize = 1024
	maxIndex            = 1<<20>>5 - 1 // MINORMASK >> part_shift, for max_part=16
	nbdMajor            = 43

	nbdRequestMagic = 0x25609513
	nbdCmdDisc      = 2

	genlIDCtrl           = 0x10 // GENL_ID_CTRL, linux/genetlink.h
	ctrlCmdNewFamily     = 1
	ctrlCmdGetFamily     = 3
	ctrlAttrFamilyID     = 1
	ctrlAttrFamilyName   = 2
	ctrlAttrVersion      = 3
	ctrlAttrMcastGroups  = 7
	ctrlAttrMcastGrpName = 1
	ctrlAttrMcastGrpID   = 2
)
