package main

import (
	"errors"
	"regexp"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// A kernelLog reads what the kernel says from now on.
type kernelLog struct{ fd int }

func openKernelLog(t testing.TB) *kernelLog {
	t.Helper()
	fd, err := unix.Open("/dev/kmsg", unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatalf("/dev/kmsg: %v", err)
	}
	if _, err := unix.Seek(fd, 0, unix.SEEK_END); err != nil {
		t.Fatalf("/dev/kmsg: %v", err)
	}
	return &kernelLog{fd}
}

// suspicious lines come from the nbd driver or the block layer, or tell of a
// task that hangs or a kernel that trips.
var suspicious = regexp.MustCompile(`^(block )?nbd|I/O error|blocked for more than|WARNING|BUG|Oops|stall`)

// ordinary are those that an orderly life of a device brings.
var ordinary = regexp.MustCompile(
	`^block nbd\d+: (NBD_DISCONNECT|shutting down sockets|Disconnected due to user request\.)$|` +
		`^nbd\d+: detected capacity change|^ ?nbd\d+: p\d|^nbd: registered device`)

// repeated says that a line came too often: as this is of lines that were said, they are judged.
var repeated = regexp.MustCompile(`callbacks suppressed$`)

// check reports the suspicious lines that are neither ordinary nor allowed.
func (l *kernelLog) check(t testing.TB, allowed []string) {
	t.Helper()
	known := []*regexp.Regexp{ordinary}
	for _, a := range allowed {
		known = append(known, regexp.MustCompile(a), repeated)
	}
	l.lines(t, func(line string) {
		matches := func(r *regexp.Regexp) bool { return r.MatchString(line) }
		if suspicious.MatchString(line) && !slices.ContainsFunc(known, matches) {
			t.Errorf("the kernel says: %s", line)
		}
	})
}

// lines passes on what the kernel has said by now, and closes the log.
func (l *kernelLog) lines(t testing.TB, each func(string)) {
	t.Helper()
	defer unix.Close(l.fd)
	buf := make([]byte, 8192)
	for {
		n, err := unix.Read(l.fd, buf)
		if errors.Is(err, unix.EAGAIN) {
			return
		}
		if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.EINTR) {
			continue // the oldest lines were overwritten
		}
		if err != nil {
			t.Fatalf("/dev/kmsg: %v", err)
		}
		// "priority,sequence,time,flags;text\n KEY=value…"
		_, line, _ := strings.Cut(string(buf[:n]), ";")
		line, _, _ = strings.Cut(line, "\n")
		each(line)
	}
}
