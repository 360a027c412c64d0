package nbdnl

import (
	"errors"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// netlinkNumbers are this package's numbers by their names in linux/nbd-netlink.h.
var netlinkNumbers = map[string]uint64{
	"NBD_GENL_VERSION": familyVersion,

	"NBD_CMD_CONNECT":     cmdConnect,
	"NBD_CMD_DISCONNECT":  cmdDisconnect,
	"NBD_CMD_RECONFIGURE": cmdReconfigure,
	"NBD_CMD_LINK_DEAD":   cmdLinkDead,
	"NBD_CMD_STATUS":      cmdStatus,

	"NBD_ATTR_INDEX":              attrIndex,
	"NBD_ATTR_SIZE_BYTES":         attrSizeBytes,
	"NBD_ATTR_BLOCK_SIZE_BYTES":   attrBlockSizeBytes,
	"NBD_ATTR_TIMEOUT":            attrTimeout,
	"NBD_ATTR_SERVER_FLAGS":       attrServerFlags,
	"NBD_ATTR_CLIENT_FLAGS":       attrClientFlags,
	"NBD_ATTR_SOCKETS":            attrSockets,
	"NBD_ATTR_DEAD_CONN_TIMEOUT":  attrDeadConnTimeout,
	"NBD_ATTR_DEVICE_LIST":        attrDeviceList,
	"NBD_ATTR_BACKEND_IDENTIFIER": attrBackendIdentifier,

	"NBD_SOCK_ITEM":        attrSockItem,
	"NBD_SOCK_FD":          attrSockFD,
	"NBD_DEVICE_ITEM":      attrDeviceItem,
	"NBD_DEVICE_INDEX":     attrDeviceIndex,
	"NBD_DEVICE_CONNECTED": attrDeviceConnected,
}

// flagNumbers are this package's flags by their names in linux/nbd.h.
var flagNumbers = map[string]uint64{
	"NBD_FLAG_HAS_FLAGS":         uint64(FlagHasFlags),
	"NBD_FLAG_READ_ONLY":         uint64(FlagReadOnly),
	"NBD_FLAG_SEND_FLUSH":        uint64(FlagSendFlush),
	"NBD_FLAG_SEND_FUA":          uint64(FlagSendFUA),
	"NBD_FLAG_ROTATIONAL":        uint64(FlagRotational),
	"NBD_FLAG_SEND_TRIM":         uint64(FlagSendTrim),
	"NBD_FLAG_SEND_WRITE_ZEROES": uint64(FlagSendWriteZeroes),
	"NBD_FLAG_CAN_MULTI_CONN":    uint64(FlagCanMultiConn),

	"NBD_CFLAG_DESTROY_ON_DISCONNECT": uint64(DestroyOnDisconnect),
	"NBD_CFLAG_DISCONNECT_ON_CLOSE":   uint64(DisconnectOnClose),
}

// ioctlNumbers are this package's requests by their names in linux/nbd.h, where they are _IO(0xab,
// number).
var ioctlNumbers = map[string]uint64{
	"NBD_SET_SOCK":        ioctlSetSock,
	"NBD_SET_BLKSIZE":     ioctlSetBlockSize,
	"NBD_DO_IT":           ioctlDoIt,
	"NBD_CLEAR_SOCK":      ioctlClearSock,
	"NBD_SET_SIZE_BLOCKS": ioctlSetSizeBlocks,
	"NBD_DISCONNECT":      ioctlDisconnect,
	"NBD_SET_TIMEOUT":     ioctlSetTimeout,
	"NBD_SET_FLAGS":       ioctlSetFlags,
}

func TestIoctlsOfHeader(t *testing.T) {
	text, err := os.ReadFile("/usr/include/linux/nbd.h")
	if errors.Is(err, os.ErrNotExist) && os.Getenv("NBD_TEST_REQUIRE") != "1" {
		t.Skipf("no kernel headers here: %v", err)
	}
	theirs := make(map[string]uint64)
	request := regexp.MustCompile(`(?m)^#define\s+(NBD_\w+)\s+_IO\(\s*0xab,\s*(\d+)\s*\)`)
	for _, m := range request.FindAllStringSubmatch(string(text), -1) {
		n, err := strconv.ParseUint(m[2], 10, 8)
		if err != nil {
			t.Fatal(err)
		}
		theirs[m[1]] = n
	}
	for name, ours := range ioctlNumbers {
		if n, ok := theirs[name]; !ok || ours != ioctlNone|0xab00|n {
			t.Errorf("%s is %#x, want _IO(0xab, %d)", name, ours, n)
		}
	}
}

// TestNumbersOfHeaders compares this package's numbers with those of the machine's headers. Numbers
// that an older header lacks are fine, those that it has must be known.
func TestNumbersOfHeaders(t *testing.T) {
	tests := []struct {
		header string
		ours   map[string]uint64
		// about selects the names that this package is about: the commands in nbd.h are those that
		// the kernel gives the server.
		about *regexp.Regexp
		least int // how many of them the oldest header has that this test was written for
	}{
		{"/usr/include/linux/nbd-netlink.h", netlinkNumbers, regexp.MustCompile(`^NBD_\w+$`), 20},
		{"/usr/include/linux/nbd.h", flagNumbers, regexp.MustCompile(`^NBD_C?FLAG_\w+$`), 8},
	}
	for _, tt := range tests {
		t.Run(tt.header, func(t *testing.T) {
			text, err := os.ReadFile(tt.header)
			if errors.Is(err, os.ErrNotExist) && os.Getenv("NBD_TEST_REQUIRE") != "1" {
				t.Skipf("no kernel headers here: %v", err)
			}
			if err != nil {
				t.Fatal(err)
			}
			found := 0
			for name, theirs := range headerNumbers(t, string(text)) {
				bound := strings.HasSuffix(name, "_UNSPEC") || strings.HasSuffix(name, "_MAX")
				if bound || !tt.about.MatchString(name) {
					continue
				}
				found++
				if ours, ok := tt.ours[name]; !ok {
					t.Errorf("%s (%d) is missing", name, theirs)
				} else if ours != theirs {
					t.Errorf("%s is %d, want %d", name, ours, theirs)
				}
			}
			if found < tt.least {
				t.Errorf("only %d numbers were found in the header", found)
			}
		})
	}
}

func TestNamesOfHeaders(t *testing.T) {
	text, err := os.ReadFile("/usr/include/linux/nbd-netlink.h")
	if errors.Is(err, os.ErrNotExist) && os.Getenv("NBD_TEST_REQUIRE") != "1" {
		t.Skipf("no kernel headers here: %v", err)
	}
	for name, ours := range map[string]string{
		"NBD_GENL_FAMILY_NAME":      familyName,
		"NBD_GENL_MCAST_GROUP_NAME": groupName,
	} {
		theirs := regexp.MustCompile(name + `\s+"(.*)"`).FindStringSubmatch(string(text))
		if theirs == nil || theirs[1] != ours {
			t.Errorf("%s is %q, want %q", name, ours, theirs)
		}
	}
}

var (
	headerComment = regexp.MustCompile(`(?s)/\*.*?\*/`)
	headerDefine  = regexp.MustCompile(`(?m)^#define\s+(NBD_\w+)\s+(?:(0x[0-9a-fA-F]+|\d+)|\(1\s*<<\s*(\d+)\))\s*$`)
	headerEnum    = regexp.MustCompile(`(?s)enum\s*\{(.*?)\}`)
)

// headerNumbers returns the constants of a C header: defines of a number or of (1 << n), and enums
// without initial values.
func headerNumbers(t *testing.T, text string) map[string]uint64 {
	t.Helper()
	numbers := make(map[string]uint64)
	text = headerComment.ReplaceAllString(text, " ")
	for _, m := range headerDefine.FindAllStringSubmatch(text, -1) {
		n, err := strconv.ParseUint(m[2]+m[3], 0, 64) // one of them is empty
		if err != nil {
			t.Errorf("define %s: %v", m[0], err)
		}
		if m[3] != "" {
			n = 1 << n
		}
		numbers[m[1]] = n
	}
	for _, m := range headerEnum.FindAllStringSubmatch(text, -1) {
		if strings.Contains(m[1], "=") {
			continue // the wire's, in nbd.h
		}
		for i, name := range strings.Split(m[1], ",") {
			if name = strings.TrimSpace(name); name != "" {
				numbers[name] = uint64(i)
			}
		}
	}
	return numbers
}
