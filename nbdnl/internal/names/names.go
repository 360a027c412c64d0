// Package names has the numbers and names of nbd devices.
package names

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

// Max is the highest index: the highest first minor that a device number has room for (MINORMASK).
const Max = 1<<20 - 1

// MaxIdentifier is the longest identifier, in bytes. It is well below a page, into which the kernel
// prints the identifier unchecked.
const MaxIdentifier = 1024

// Check returns an error that matches os.ErrInvalid unless there can be a device with that index.
func Check(index int) error {
	if index < 0 || index > Max {
		return fmt.Errorf("index is not within 0 and %d: %w", Max, os.ErrInvalid)
	}
	return nil
}

// Device returns the device's name in sysfs: "nbd3" for 3.
func Device(index int) string { return "nbd" + strconv.Itoa(index) }

// Index returns the index of the device with that name in sysfs. It returns false for partitions
// and for other drivers' devices.
func Index(device string) (index int, ok bool) {
	digits, ok := strings.CutPrefix(device, "nbd")
	if !ok {
		return 0, false
	}
	n, err := strconv.ParseUint(digits, 10, 32)
	// The comparison refuses what ParseUint lets pass but no device is called, such as "007".
	if err != nil || n > Max || strconv.FormatUint(n, 10) != digits {
		return 0, false
	}
	return int(n), true
}

// CheckIdentifier returns an error unless a device can carry the identifier.
func CheckIdentifier(id string) error {
	if len(id) > MaxIdentifier {
		return fmt.Errorf("identifier has %d bytes, at most %d are possible", len(id), MaxIdentifier)
	}
	for i := range len(id) {
		if id[i] < ' ' || id[i] == 0x7f {
			return fmt.Errorf("identifier %q has a control character", id)
		}
	}
	return nil
}
