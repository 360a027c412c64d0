//go:build !linux

package nbdnl

import "os"

func readAttribute(path string) ([]byte, error) { return os.ReadFile(path) }

func fileNumber(string) (uint64, error) { return 0, nil }

func readOwner(path string, wanted bool) (birth uint64, pid []byte, err error) {
	pid, err = os.ReadFile(path)
	return 0, pid, err
}
