package main

import (
	"fmt"
	"math"
	"math/bits"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/urfave/cli/v2"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/kind"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/quantity"
	"github.com/nbdctl/nbdctl/nbdnl"
)

// The ranges of connect's flags.
const (
	minBlockSize   = 512      // nbd.c, nbd_set_size: the kernel's sector
	maxBlockSize   = 64 << 10 // BLK_MAX_BLOCK_SIZE of the newest kernels; others say so themselves
	maxConnections = 64       // far above any use: the kernel wants one for each processor
	maxTimeout     = 24 * time.Hour
	maxLabel       = 64
	maxRestart     = 1000000
	defaultRestart = 5
)

// specOf reads the flags of connect. Whatever it refuses is valid on no
// machine, and nothing has been touched.
func specOf(c *cli.Context) (host.Spec, error) {
	s, err := backendOf(c, host.DefaultBlockSize)
	if err != nil {
		return s, err
	}
	s.Label, s.Ioctl = c.String("name"), c.Bool("ioctl")
	for _, read := range []func() error{
		func() error { return readDevice(c, &s) },
		func() error { return readConnections(c, &s) },
		func() (err error) { s.Timeout, err = readSeconds(c, "timeout", time.Second); return },
		func() error { return readDeadTimeout(c, &s) },
		func() error { return readRestart(c, &s) },
		func() error { return readOutage(c, &s) },
		func() error { return checkIoctl(s) },
		func() error { return checkLabel(c, s.Label) },
	} {
		if err := read(); err != nil {
			return s, err
		}
	}
	return s, nil
}

// backendFlags are those of every command that serves a backend.
var backendFlags = []cli.Flag{
	&cli.StringFlag{
		Name:  "size",
		Usage: "`SIZE` of the device: 512M, 10GiB, 4k, 1048576; default: that of the backing object",
	},
	&cli.StringFlag{
		Name: "block-size",
		Usage: "logical block `SIZE`: a power of two, 512 to 65536 " +
			"(default: 512, of serve 1, or what the backing device has)",
	},
	&cli.BoolFlag{Name: "read-only", Usage: "refuse writes"},
	&cli.BoolFlag{Name: "create", Usage: "make the backing object, of --size, if it does not exist"},
	&cli.StringSliceFlag{
		Name:    "option",
		Aliases: []string{"o"},
		Usage:   "an option of the backend, `KEY=VALUE`; may be repeated",
	},
}

// backendOf reads them, and the arguments: the backend and what it takes. A size is a
// multiple of block, unless there is a block size.
func backendOf(c *cli.Context, block int) (host.Spec, error) {
	s := host.Spec{
		Options:  c.StringSlice("option"),
		Create:   c.Bool("create"),
		ReadOnly: c.Bool("read-only"),
	}
	if err := readBackend(c.Command.Name, c.Args().Slice(), &s); err != nil {
		return s, err
	}
	for _, read := range []func() error{
		func() error { return readSize(c, &s) },
		func() error { return readBlockSize(c, &s, block) },
		func() error { return kind.Check(s) },
	} {
		if err := read(); err != nil {
			return s, err
		}
	}
	s, err := absolute(s)
	if err != nil {
		return s, err
	}
	if err := checkDescriptor(c.Command.Name, s); err != nil {
		return s, err
	}
	return kind.ReadSecrets(s)
}

// readBackend reads the arguments that name a backend, and what it takes.
func readBackend(command string, args []string, s *host.Spec) error {
	if len(args) > 0 && kind.IsURI(args[0]) {
		if len(args) > 1 {
			return exit.Usagef("%s takes a URI alone; %q is too much", command, args[1])
		}
		s.Kind, s.Arg = kind.Remote, args[0]
		return nil
	}
	if len(args) > 2 {
		return exit.Usagef("%s takes a backend and one argument; %q is too much", command, args[2])
	}
	named := append(args[:len(args):len(args)], "", "")
	s.Kind, s.Arg = named[0], named[1]
	return nil
}

// absolute makes the argument a path that means the same to the serving
// process, which has another working directory, and in a list. A descriptor keeps its
// name: the serving process has it, too.
func absolute(s host.Spec) (_ host.Spec, err error) {
	if kind.IsRemote(s.Kind) {
		s.Arg, err = kind.AbsoluteURI(s.Arg)
		return s, err
	}
	if !kind.TakesPath(s.Kind) {
		return s, nil
	}
	typed := s.Arg
	if s.Arg, err = filepath.Abs(typed); err != nil {
		return s, fmt.Errorf("%s: no working directory: %w", typed, err)
	}
	if strings.HasPrefix(s.Arg, "/proc/self/") && descriptorAt(s.Arg) < 0 {
		// The working directory, say, of this process.
		if dir, err := filepath.EvalSymlinks(filepath.Dir(s.Arg)); err == nil {
			s.Arg = filepath.Join(dir, filepath.Base(s.Arg))
		}
	}
	if !utf8.ValidString(s.Arg) {
		// It could not be told in JSON, neither to the serving process nor to a script.
		return s, exit.Usagef("%q: a path must be valid UTF-8; a link with such a name will do", s.Arg)
	}
	return s, nil
}

func readDevice(c *cli.Context, s *host.Spec) error {
	v := c.String("device")
	if !c.IsSet("device") {
		return nil
	}
	index, err := nbdnl.ParseIndex(v)
	if err != nil {
		return exit.Usagef("--device %s: must be a device like nbd5, /dev/nbd5 or 5, up to nbd32767", v)
	}
	s.Index = &index
	return nil
}

func readSize(c *cli.Context, s *host.Spec) (err error) {
	v := c.String("size")
	if !c.IsSet("size") {
		return nil
	}
	if s.Size, err = quantity.ParseSize(v); err != nil {
		return exit.Usagef("--size %s: %w", v, err)
	}
	if s.Size == 0 {
		return exit.Usagef("--size %s: must be above zero", v)
	}
	return nil
}

func readBlockSize(c *cli.Context, s *host.Spec, block int) error {
	v := c.String("block-size")
	if !c.IsSet("block-size") {
		return checkMultiple(s.Size, block)
	}
	n, err := quantity.ParseSize(v)
	if err != nil || n < minBlockSize || n > maxBlockSize || bits.OnesCount64(uint64(n)) != 1 {
		return exit.Usagef("--block-size %s: must be a power of two from %d to %d", v, minBlockSize, maxBlockSize)
	}
	s.BlockSize = int(n)
	return checkMultiple(s.Size, s.BlockSize)
}

// checkMultiple refuses a size that has a part of a block at its end.
func checkMultiple(size int64, block int) error {
	over := size % int64(block)
	if over == 0 {
		return nil
	}
	var near []string
	if less := size - over; less > 0 {
		near = append(near, strconv.FormatInt(less, 10))
	}
	if more := int64(block) - over; more <= math.MaxInt64-size {
		near = append(near, strconv.FormatInt(size+more, 10))
	}
	return exit.Usagef("--size %d: must be a multiple of the block size %d, as %s",
		size, block, strings.Join(near, " or "))
}

func readConnections(c *cli.Context, s *host.Spec) (err error) {
	v := c.String("connections")
	if s.Connections, err = strconv.Atoi(v); err != nil || s.Connections < 1 || s.Connections > maxConnections {
		return exit.Usagef("--connections %s: must be a number from 1 to %d", v, maxConnections)
	}
	return nil
}

func readSeconds(c *cli.Context, flag string, least time.Duration) (time.Duration, error) {
	d, err := quantity.ParseSeconds(c.String(flag), least, maxTimeout)
	if err != nil {
		return 0, exit.Usagef("--%s %s: %w", flag, c.String(flag), err)
	}
	return d, nil
}

// readDeadTimeout leaves it to the way in which the device is served unless it is said.
func readDeadTimeout(c *cli.Context, s *host.Spec) (err error) {
	s.DeadTimeout = -1
	if c.IsSet("dead-timeout") {
		s.DeadTimeout, err = readSeconds(c, "dead-timeout", 0)
	}
	return err
}

// readRestart reads how often a process is replaced.
func readRestart(c *cli.Context, s *host.Spec) (err error) {
	v, why := c.String("restart"), ""
	switch {
	case s.Ioctl:
		why = "--ioctl: the kernel ends the device with the process"
	case c.Bool("foreground"):
		why = "--foreground: who has started it sees it end"
	case s.DeadTimeout == 0:
		why = "--dead-timeout 0s: no request would wait for the next process"
	}
	switch {
	case c.IsSet("restart") && v == "no":
	case c.IsSet("restart"):
		if s.Restart, err = strconv.Atoi(v); err != nil || s.Restart < 1 || s.Restart > maxRestart {
			return exit.Usagef("--restart %s: must be no, or a number from 1 to %d", v, maxRestart)
		}
		if why != "" {
			return exit.Usagef("--restart %s: not with %s", v, why)
		}
	case why == "":
		s.Restart = defaultRestart
	}
	return nil
}

// readOutage has requests to another server wait for it unless it is said for how long.
func readOutage(c *cli.Context, s *host.Spec) error {
	switch {
	case !kind.IsRemote(s.Kind):
	case !c.IsSet("dead-timeout"):
		s.DeadTimeout = kind.DefaultOutage
	case s.DeadTimeout == 0:
		return exit.Usagef("--dead-timeout 0s: a server that is away for a moment would be errors; use 1s or more")
	}
	return nil
}

// checkIoctl refuses what no kernel can do by ioctls.
func checkIoctl(s host.Spec) error {
	if s.Ioctl && s.DeadTimeout > 0 {
		return exit.Usagef("--ioctl: has no --dead-timeout, since by ioctls no connection can be replaced")
	}
	return nil
}

// checkLabel refuses a name that could be taken for a device, or that would
// break a line of the list.
func checkLabel(c *cli.Context, label string) error {
	if !c.IsSet("name") {
		return nil
	}
	if _, err := nbdnl.ParseIndex(label); err == nil {
		return exit.Usagef("--name %s: is what a device is called; choose a name that is none", label)
	}
	ok := strings.IndexFunc(label, func(r rune) bool {
		return !strings.ContainsRune("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-", r)
	}) < 0
	if !ok || label == "" || len(label) > maxLabel || label[0] == '-' {
		return exit.Usagef("--name %q: must be 1 to %d letters, digits, dots, dashes and underscores, "+
			"not beginning with a dash", label, maxLabel)
	}
	return nil
}
