package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/kind"
)

// maxLinks is how many symbolic links Linux follows in one path (path_resolution(7)).
const maxLinks = 40

// descriptorAt returns the number of the descriptor of this process that path leads to,
// and -1 if it leads to none. Such a path means another file to another process.
func descriptorAt(path string) int {
	for range maxLinks {
		switch path {
		case "/dev/stdin":
			return 0
		case "/dev/stdout":
			return 1
		case "/dev/stderr":
			return 2
		}
		for _, dir := range []string{"/dev/fd/", "/proc/self/fd/", "/proc/thread-self/fd/"} {
			number, ok := strings.CutPrefix(path, dir)
			if n, err := strconv.ParseUint(number, 10, 31); ok && err == nil {
				return int(n)
			}
		}
		to, err := os.Readlink(path)
		if err != nil {
			return -1
		}
		if !filepath.IsAbs(to) {
			to = filepath.Join(filepath.Dir(path), to)
		}
		path = filepath.Clean(to)
	}
	return -1
}

// imageDescriptor returns the descriptor that is the image of s, and -1 for none.
func imageDescriptor(s host.Spec) int {
	if !kind.TakesPath(s.Kind) {
		return -1
	}
	return descriptorAt(s.Arg)
}

// checkDescriptor refuses an image on a descriptor that the user has not opened for it.
// What the process has opened itself must not be taken for an image, and what it prints
// would overwrite one.
func checkDescriptor(command string, s host.Spec) error {
	switch n := imageDescriptor(s); {
	case n == 1 || n == 2:
		return exit.Usagef("%s is where %s prints to; "+
			"pass the image as another descriptor: nbdctl %[2]s file /dev/stdin <>disk.img", s.Arg, command)
	case n >= 0 && !host.Inherited(n):
		return fmt.Errorf("%s: nbdctl was started without a descriptor %d", s.Arg, n)
	}
	return nil
}
