package host

import (
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// Inherited tells whether descriptor n is one that the process was started with. What Go
// opens is closed when a program is executed.
func Inherited(n int) bool {
	flags, err := unix.FcntlInt(uintptr(n), unix.F_GETFD, 0)
	return err == nil && flags&unix.FD_CLOEXEC == 0
}

// layout returns the files that a serving process inherits, and their names, with the
// descriptor image among them so that it keeps its number. Standard input is not one of them.
func layout(names []string, files []*os.File, image int) ([]string, []*os.File) {
	at := image - firstFile
	if at < 0 {
		return names, files
	}
	for len(files) < at {
		names, files = append(names, ""), append(files, nil)
	}
	return slices.Insert(names, at, fileImage), slices.Insert(files, at, os.NewFile(uintptr(image), fileImage))
}

// forgetStdin puts /dev/null in the place of standard input, which an image may have been.
func forgetStdin() error {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	defer null.Close()
	return withDescriptor(null, func(fd uintptr) error { return unix.Dup3(int(fd), 0, 0) })
}
