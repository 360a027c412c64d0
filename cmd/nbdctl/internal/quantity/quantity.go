// Package quantity reads and writes sizes and durations as people do.
package quantity

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// units maps what may follow the digits of a size to bytes. As with qemu-img
// and GNU coreutils a bare letter is a power of 1024, as is KiB; KB is 1000.
var units = func() map[string]int64 {
	m := map[string]int64{"": 1, "b": 1}
	binary, decimal := int64(1), int64(1)
	for _, prefix := range "kmgtpe" {
		binary *= 1024
		decimal *= 1000
		p := string(prefix)
		m[p], m[p+"ib"], m[p+"b"] = binary, binary, decimal
	}
	return m
}()

// ErrTooLarge is the error of sizes that no file and no device can have.
var ErrTooLarge = errors.New("a size is below 8 EiB")

var errSize = errors.New("a size is a whole number of bytes with an optional unit: 1048576, 512M, 10GiB, 4k")

// ParseSize reads a size in bytes: 0 to 2^63-1.
func ParseSize(s string) (int64, error) {
	digits := strings.TrimRight(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
	unit, ok := units[strings.ToLower(strings.TrimLeft(s[len(digits):], " "))]
	// ParseUint takes no sign, no fraction and no empty string, as we want.
	n, err := strconv.ParseUint(digits, 10, 63)
	if !ok || err != nil && !errors.Is(err, strconv.ErrRange) {
		return 0, errSize
	}
	if err != nil || int64(n) > math.MaxInt64/unit {
		return 0, ErrTooLarge
	}
	return int64(n) * unit, nil
}

// FormatSize writes a size with the largest unit that leaves it whole or has
// at least one digit before the point: 512M, 1.5G, 1048577 becomes 1.0M.
func FormatSize(n int64) string {
	const prefixes = "KMGTPE"
	if n < 1024 {
		return strconv.FormatInt(n, 10)
	}
	v, i := float64(n), -1
	// From 1023.95 on, %.1f would round up to 1024.0.
	for v >= 1023.95 && i < len(prefixes)-1 {
		v /= 1024
		i++
	}
	if v == math.Trunc(v) {
		return fmt.Sprintf("%.0f%c", v, prefixes[i])
	}
	return fmt.Sprintf("%.1f%c", v, prefixes[i])
}

// ParseSeconds reads a duration that is a whole number of seconds, from least
// to most: the kernel's timeouts know no parts of a second.
func ParseSeconds(s string, least, most time.Duration) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if n, atoi := strconv.Atoi(s); atoi == nil {
		// A bare number of seconds, as nbd-client and qemu-nbd take it.
		d, err = time.Duration(n)*time.Second, nil
		if n != int(d/time.Second) {
			err = strconv.ErrRange
		}
	}
	if err != nil || d < least || d > most || d%time.Second != 0 {
		return 0, fmt.Errorf("a duration is whole seconds from %s to %s, for example 30s",
			FormatSeconds(least), FormatSeconds(most))
	}
	return d, nil
}

// FormatSeconds writes a duration without the trailing zero units that
// time.Duration prints: 30s, 5m, 24h.
func FormatSeconds(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}
