package nbdnl

import (
	"crypto/rand"
	"fmt"
)

// NewIdentifier returns prefix, a colon and a random UUID (RFC 9562, version 4): a mark that no
// other device carries, and by whose prefix a program recognises its own devices in sysfs.
func NewIdentifier(prefix string) string {
	var u [16]byte
	rand.Read(u[:]) // never fails: crypto/rand ends the program instead
	u[6] = u[6]&0x0f | 0x40
	u[8] = u[8]&0x3f | 0x80
	return fmt.Sprintf("%s:%x-%x-%x-%x-%x", prefix, u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}
