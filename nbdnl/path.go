package nbdnl

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/nbdctl/nbdctl/nbdnl/internal/names"
)

// Path returns the path of the device with that index: "/dev/nbd3" for 3.
func Path(index int) string { return "/dev/" + name(index) }

// name returns the device's name in sysfs and in messages.
func name(index int) string { return names.Device(index) }

// ParseIndex returns the index that s means: "nbd5", "/dev/nbd5" or "5". It does not look whether
// there is such a device.
func ParseIndex(s string) (int, error) {
	digits := strings.TrimPrefix(strings.TrimPrefix(s, "/dev/"), "nbd")
	if strings.HasPrefix(s, "/dev/") && !strings.HasPrefix(s, "/dev/nbd") {
		return 0, fmt.Errorf("nbdnl: %q is not an nbd device: want nbd5, /dev/nbd5 or 5", s)
	}
	index, err := strconv.ParseUint(digits, 10, 32)
	// The comparison refuses what ParseUint lets pass but no device is called, such as "007".
	if err != nil || strconv.FormatUint(index, 10) != digits {
		return 0, fmt.Errorf("nbdnl: %q is not an nbd device: want nbd5, /dev/nbd5 or 5", s)
	}
	if index > maxIndex {
		return 0, fmt.Errorf("nbdnl: index %d is not within 0 and %d", index, maxIndex)
	}
	return int(index), nil
}
