package kind

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/nbdctl/nbdctl/backends/file"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
)

var fileKind = Kind{
	Name:     "file",
	Synopsis: "file PATH",
	Summary: "a raw image or a block device; --create --size 10G makes a sparse image; " +
		"-o direct=on goes past the page cache; -o lock=off does without a lock",
	TakesPath: true,
	Options:   []string{"direct", "lock"},
	Check: func(s host.Spec) error {
		switch {
		case s.Arg == "":
			return exit.Usagef("file needs a path: nbdctl connect file disk.img")
		case s.Create && s.Size == 0:
			return exit.Usagef("--create needs --size, for example --size 10G")
		case s.Create && s.ReadOnly:
			return exit.Usagef("--create and --read-only exclude each other: a new image would stay empty")
		}
		_, err := fileOptions(s)
		return err
	},
	Open:    openFile,
	Inherit: inheritFile,
}

// fileOptions are the options of a spec.
func fileOptions(s host.Spec) (opts file.Options, err error) {
	if opts.Direct, err = onOff(s, "direct", false); err != nil {
		return opts, err
	}
	lock, err := onOff(s, "lock", true)
	opts.NoLock = !lock
	return opts, err
}

// onOff is the value of an option that is on or off, or what it is where it is not given.
func onOff(s host.Spec, key string, otherwise bool) (bool, error) {
	switch v, ok := option(s, key); {
	case !ok:
		return otherwise, nil
	case v == "off", v == "false":
		return false, nil
	case v == "on", v == "true":
		return true, nil
	default:
		return false, exit.Usagef("-o %s=%s: must be on or off", key, v)
	}
}

func openFile(_ context.Context, s host.Spec, export bool) (*host.Backing, error) {
	opts, err := fileOptions(s)
	if err != nil {
		return nil, err
	}
	block := s.BlockSize
	switch {
	case block != 0:
	case export:
		block, opts.AllowEmpty = 1, true
	default:
		block = host.DefaultBlockSize
	}
	opts.ReadOnly, opts.Create, opts.Size, opts.BlockSize = s.ReadOnly, s.Create, s.Size, block
	f, err := file.Open(s.Arg, opts)
	if err != nil {
		return nil, adviseFile(s, err)
	}
	if need := f.BlockSizes().Minimum; need > block {
		if s.BlockSize != 0 {
			err := fmt.Errorf("%s has blocks of %d bytes: --block-size must be a multiple of that", s.Arg, need)
			return nil, errors.Join(err, f.Discard())
		}
		block = need
	}
	if f.Size() == 0 && f.Tail() != 0 { // with direct I/O
		return nil, errors.Join(&file.SizeError{Path: s.Arg, Have: f.Tail(), BlockSize: block}, f.Discard())
	}
	b := fileBacking(f)
	if f.Created() {
		b.Discard = f.Discard
	}
	if opts.Direct && block != s.BlockSize && block > host.DefaultBlockSize {
		b.Warnings = append(b.Warnings, fmt.Sprintf(
			"%s: the device has blocks of %d bytes, as direct I/O needs them here: no partitions of %d are found",
			s.Arg, block, host.DefaultBlockSize))
	}
	if tail := f.Tail(); tail != 0 {
		what := "device"
		if export {
			what = "export"
		}
		b.Warnings = append(b.Warnings, fmt.Sprintf(
			"%s: its last %d bytes are not part of the %s: they are less than a block of %d",
			s.Arg, tail, what, block))
	}
	return b, nil
}

// inheritFile goes on with an open file, and with it the lock, whatever is at its path by now. From
// a keeper there is a witness, too.
func inheritFile(_ context.Context, s host.Spec, i host.Inheritance) (*host.Backing, error) {
	var witness *os.File
	if n := len(i.Files); n == 2 {
		witness, i.Files = i.Files[1], i.Files[:1]
	}
	b, err := inheritOpen(s, i)
	switch {
	case witness == nil:
	case err != nil:
		witness.Close()
	default:
		b.Missed = func() error {
			defer witness.Close()
			if err := witness.Sync(); err != nil {
				return fmt.Errorf("%s: what the process before had written is not in it: %w", s.Arg, err)
			}
			return nil
		}
	}
	return b, err
}

func inheritOpen(s host.Spec, i host.Inheritance) (*host.Backing, error) {
	open, err := i.File()
	if err != nil {
		return nil, err
	}
	opts, err := fileOptions(s)
	var f *file.File
	if err == nil {
		opts.ReadOnly, opts.BlockSize, opts.AllowEmpty = s.ReadOnly, i.BlockSize, i.Export
		f, err = file.New(open, opts)
	}
	if err != nil {
		open.Close()
		return nil, err
	}
	return fileBacking(f), nil
}

func fileBacking(f *file.File) *host.Backing {
	return &host.Backing{
		Backend: f, Close: f.Close, Identity: host.IdentityOf(f.Underlying()),
		Keep: func() (host.Kept, error) { return kept(keepFile(f.Underlying())) },
		HandOver: func() (*host.Handed, error) {
			return &host.Handed{Files: []*os.File{f.Underlying()}, Resume: func() {}, Leave: f.Close}, nil
		},
	}
}

// adviseFile adds to an error of opening a file what to do about it.
func adviseFile(s host.Spec, err error) error {
	var size *file.SizeError
	var direct *file.DirectError
	var readOnly *file.ReadOnlyError
	var noLocks *file.NoLocksError
	switch {
	case errors.As(err, &direct):
		return fmt.Errorf("%w; leave out -o direct", err)
	case errors.As(err, &size) && s.Size != 0:
		return exit.With(exit.Usage, "--size: %w; leave --size out to take the file as it is", err)
	case errors.Is(err, fs.ErrNotExist) && !s.Create:
		return fmt.Errorf("%w; --create --size SIZE makes it", err)
	case errors.As(err, &readOnly) && s.Create:
		return fmt.Errorf("%w; use --read-only, without --create", err)
	case errors.As(err, &readOnly):
		return fmt.Errorf("%w; use --read-only", err)
	case errors.As(err, &noLocks):
		return fmt.Errorf("%w; -o lock=off does without, where nobody else uses it", err)
	}
	return err
}
