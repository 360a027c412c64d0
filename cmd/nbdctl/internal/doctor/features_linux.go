package doctor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/nbdnl"
)

// offered are the flags that a device is connected with, and what they are called.
var offered = []struct {
	flag nbdnl.Flags
	name string
}{
	{nbdnl.FlagSendFlush, "flush"},
	{nbdnl.FlagSendFUA, "FUA"},
	{nbdnl.FlagSendTrim, "trim"},
	{nbdnl.FlagSendWriteZeroes, "write-zeroes"},
	{nbdnl.FlagRotational, "rotational"},
}

// sticky are those that stay with an index from one use to the next, from
// Linux 6.12 to 7.2.
const sticky = nbdnl.FlagSendWriteZeroes | nbdnl.FlagRotational

// largestBlock is the largest that any kernel takes, in bytes (BLK_MAX_BLOCK_SIZE).
const largestBlock = 64 << 10

// features tells what this kernel makes of a server that can do everything.
func (m *Machine) features(ctx context.Context) []Finding {
	b, needs := m.openBench(ctx)
	if needs != "" {
		return []Finding{unknown(needs)}
	}
	if m.byIoctl {
		return []Finding{unknown("netlink")} // ioctls have no identifiers on any kernel
	}
	cfg := nbdnl.Config{Flags: nbdnl.FlagCanMultiConn}
	var asked nbdnl.Flags
	for _, o := range offered {
		asked |= o.flag
	}
	if !b.fresh && !m.release().Before(6, 12, 0) {
		asked &^= sticky
	}
	cfg.Flags |= asked
	var st nbdnl.Status
	look := func(s nbdnl.Status) { st = s }
	if b.fresh { // for an index keeps the minimum_io_size of large blocks
		cfg.BlockSize = largestBlock
	}
	err := b.cycle(ctx, cfg, look)
	if b.fresh && errors.Is(err, syscall.EINVAL) {
		cfg.BlockSize = os.Getpagesize()
		err = b.cycle(ctx, cfg, look)
	}
	if err != nil {
		return []Finding{m.failed(err)}
	}
	return []Finding{featuresOf(st, asked, cfg.BlockSize)}
}

// featuresOf is the finding about a device that was to have certain flags, and
// blocks of that many bytes; 0: large ones were not tried.
func featuresOf(st nbdnl.Status, asked nbdnl.Flags, block int) Finding {
	var has, lacks []string
	for _, o := range offered {
		switch {
		case st.Flags&o.flag != 0:
			has = append(has, o.name)
		case asked&o.flag != 0:
			lacks = append(lacks, o.name)
		}
	}
	seen := strings.Join(append(has, "several connections"), ", ")
	if block > 0 {
		seen += fmt.Sprintf(", blocks of 512 to %d bytes", block)
	}
	if st.HasIdentifier {
		seen += ", identifiers"
	} else {
		lacks = append(lacks, "identifiers")
	}
	f := ok("%s", seen)
	if len(lacks) > 0 {
		f.Seen += "; not in this kernel: " + strings.Join(lacks, ", ")
	}
	if !st.HasIdentifier {
		f.Result = Warning
		f = f.because("that a device is nbdctl's is known from its records alone").do("a kernel from 5.14 on")
	}
	return f
}

// sockets tells over which kinds of sockets a device can be connected.
func (m *Machine) sockets(ctx context.Context) []Finding {
	b, needs := m.openBench(ctx)
	if needs != "" {
		return []Finding{unknown(needs)}
	}
	var takes, refuses, others []string
	untried := ""
	for _, k := range []struct {
		name string
		try  func() error
	}{
		{"Unix stream", func() error { return b.cycle(ctx, nbdnl.Config{}, nil) }},
		{"TCP", func() error { return b.overTCP(ctx) }},
		// Old kernels take everything, and this one without a complaint.
		{"others (Unix seqpacket)", func() error { return b.overSeqpacket(ctx) }},
	} {
		switch err := k.try(); {
		case errors.Is(err, errUntried):
			untried = "; " + err.Error()
		case err == nil:
			takes = append(takes, k.name)
		case errors.Is(err, syscall.EINVAL):
			refuses = append(refuses, k.name)
		case errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EADDRNOTAVAIL):
			untried = "; TCP was not tried, for there is no loopback interface here that is up"
		default:
			others = append(others, fmt.Sprintf("%s could not be tried: %v", k.name, err))
		}
	}
	f := ok("takes %s", strings.Join(takes, ", "))
	if len(refuses) > 0 {
		f.Seen += "; refuses " + strings.Join(refuses, ", ")
		f = f.because("a server that is reached over another kind, as vsock, needs a relay")
	}
	f.Seen += untried
	if others != nil {
		f.Result = Warning
		f.Seen += "; " + strings.Join(others, "; ")
	}
	return []Finding{f}
}

// overTCP connects a device over the loopback interface.
func (b *bench) overTCP(ctx context.Context) error {
	l, err := serveTCP()
	if err != nil {
		return err
	}
	return errors.Join(b.cycleOver(ctx, nbdnl.Config{Sockets: l.kernel}, nil, b.end), l.close())
}

// errUntried is why a kind of socket was not tried.
var errUntried = errors.New("others were not tried, for an old kernel takes them, " +
	"and udev would read from a device that nobody serves")

// overSeqpacket connects a device over a socket of another kind, which nobody serves.
func (b *bench) overSeqpacket(ctx context.Context) error {
	if b.udev && !b.fresh {
		return errUntried
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socketpair", err)
	}
	f, peer := os.NewFile(uintptr(fds[0]), "kernel"), os.NewFile(uintptr(fds[1]), "server")
	return errors.Join(b.cycleOver(ctx, nbdnl.Config{Sockets: []syscall.Conn{f}}, nil, b.cut), f.Close(), peer.Close())
}
