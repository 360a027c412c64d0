package server

import (
	"fmt"
	"strings"
	"unicode/utf8"
)

// maxName is the longest string of the protocol in bytes ("Strings" of the protocol document).
const maxName = 4096

// CheckName reports why an export can't have that name: the protocol's strings are UTF-8 without zero bytes, at most 4096 bytes long.
func CheckName(name string) error {
	switch {
	case len(name) > maxName:
		return fmt.Errorf("server: an export name of %d bytes, which begins with %q: the protocol has none above %d", len(name), name[:32], maxName)
	case !utf8.ValidString(name):
		return fmt.Errorf("server: export name %q is not UTF-8", name)
	case strings.ContainsRune(name, 0):
		return fmt.Errorf("server: export name %q has a zero byte in it", name)
	}
	return nil
}
