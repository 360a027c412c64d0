package machine

import "path/filepath"

// A Root is the directory that holds a machine's proc, sys, dev and run. The zero value is the root
// directory.
type Root string

// Path returns the path of a file of the machine, given from the root directory on.
func (r Root) Path(elem ...string) string {
	return filepath.Join(append([]string{string(r), "/"}, elem...)...)
}
