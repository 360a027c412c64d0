//go:build !linux

package machine

import "os"

// ReadAttribute reads a file of sysfs.
func ReadAttribute(path string) ([]byte, error) { return os.ReadFile(path) }

// IncarnationOf returns none.
func IncarnationOf(string) (Incarnation, error) { return 0, nil }

// ReadIncarnation returns no incarnation, and the file's content.
func ReadIncarnation(path string, wanted bool) (now Incarnation, content []byte, err error) {
	content, err = os.ReadFile(path)
	return 0, content, err
}
