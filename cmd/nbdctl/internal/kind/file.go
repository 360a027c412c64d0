package kind

import (
	"errors"
	"fmt"
	"io/fs"
	"syscall"

	"github.com/nbdctl/nbdctl/backends/file"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
)

var fileKind = Kind{
	Name:      "file",
	Synopsis:  "file PATH",
	Summary:   "a raw image or a block device; --create --size 10G makes a sparse image",
	takesPath: true,
	check: func(s host.Spec) error {
		switch {
		case s.Arg == "":
			return exit.Usagef("file needs a path: nbdctl connect file disk.img")
		case s.Create && s.Size == 0:
			return exit.Usagef("--create needs --size, for example --size 10G")
		case s.Create && s.ReadOnly:
			return exit.Usagef("--create and --read-only exclude each other: a new image would stay empty")
		}
		return nil
	},
	open: openFile,
}

func openFile(s host.Spec) (*host.Backing, error) {
	block := s.BlockSize
	if block == 0 {
		block = host.DefaultBlockSize
	}
	f, err := file.Open(s.Arg, file.Options{ReadOnly: s.ReadOnly, Create: s.Create, Size: s.Size, BlockSize: block})
	if err != nil {
		return nil, adviseFile(s, err)
	}
	b := &host.Backing{Backend: f, Close: f.Close}
	if f.Created() {
		b.Discard = f.Discard
	}
	if tail := f.Tail(); tail != 0 {
		b.Warnings = append(b.Warnings,
			fmt.Sprintf("%s: its last %d bytes are not part of the device: they are less than a block of %d", s.Arg, tail, block))
	}
	return b, nil
}

// adviseFile adds to an error of opening a file what to do about it.
func adviseFile(s host.Spec, err error) error {
	var size *file.SizeError
	switch {
	case errors.As(err, &size) && s.Size != 0:
		return exit.With(exit.Usage, "--size: %w; leave --size out to take the file as it is", err)
	case errors.Is(err, fs.ErrNotExist) && !s.Create:
		return fmt.Errorf("%w; --create --size SIZE makes it", err)
	case errors.Is(err, syscall.EROFS) && !s.ReadOnly:
		return fmt.Errorf("%w; use --read-only", err)
	}
	return err
}
