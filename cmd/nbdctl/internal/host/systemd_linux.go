package host

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// unitSlice is where units belong that no login has to do with.
	unitSlice = "system.slice"
	// unitPatience bounds what systemd may take to start something.
	unitPatience = 10 * time.Second
	// maxStored bounds the descriptors of a device that systemd keeps.
	maxStored = 1024
)

// systemdRun returns the program by which systemd starts units; "": there is no systemd here, or it
// is not for us. It is the first process then, in all the namespaces of this one.
func systemdRun() string {
	if st, err := os.Stat("/run/systemd/system"); err != nil || !st.IsDir() || os.Geteuid() != 0 {
		return ""
	}
	for _, namespace := range []string{"mnt", "pid", "net", "user"} {
		ours, err1 := os.Readlink("/proc/self/ns/" + namespace)
		first, err2 := os.Readlink("/proc/1/ns/" + namespace)
		if err1 != nil || err2 != nil || ours != first {
			return ""
		}
	}
	path, err := exec.LookPath("systemd-run")
	if err != nil {
		return ""
	}
	return path
}

// newUnit makes up the name of a unit, without what kind it is of.
func newUnit() string {
	var b [6]byte
	_, _ = rand.Read(b[:]) // It never fails.
	return "nbdctl-" + hex.EncodeToString(b[:])
}

// scope is the command that has systemd put itself into a unit that no login has to do with, before
// it executes the program and arguments that are to follow.
func scope(systemdRun string) []string {
	return []string{
		systemdRun, "--scope", "--quiet", "--collect", "--slice=" + unitSlice, "--unit=" + newUnit(),
		"--description=nbdctl: a block device",
		// At shutdown it is stopped when what uses it is, and not before.
		"--property=DefaultDependencies=no", "--",
	}
}

// startUnit has systemd start a keeper, whose descriptors it keeps, and which it starts again when
// that dies. It returns the connection to it.
func startUnit(systemdRun string) (_ *net.UnixConn, err error) {
	dir, err := os.MkdirTemp("/run", "nbdctl-keeper-") // for root alone
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "s"), Net: "unix"})
	if err != nil {
		return nil, err
	}
	defer l.Close()
	program, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return nil, err
	}
	unit := newUnit()
	args := []string{
		"--quiet", "--no-block", "--collect", "--slice=" + unitSlice, "--unit=" + unit,
		"--description=nbdctl: keeper of a block device",
		"--property=DefaultDependencies=no",
		"--property=NotifyAccess=main", fmt.Sprintf("--property=FileDescriptorStoreMax=%d", maxStored),
		"--property=Restart=on-failure", "--property=RestartSec=100ms",
		"--property=StartLimitIntervalSec=10min", "--property=StartLimitBurst=10",
		// What the keeper has started is not to end with it.
		"--property=KillMode=process", "--property=OOMPolicy=continue", "--property=TimeoutStopSec=10s",
		"--setenv=" + meetVariable + "=" + l.Addr().String(), "--setenv=" + unitVariable + "=" + unit + ".service",
	}
	for _, v := range os.Environ() {
		// The rest, which may be secret, comes over the socket: anybody may look at units.
		if name, _, _ := strings.Cut(v, "="); strings.HasPrefix(name, "NBD") && !ofUnit(name) {
			args = append(args, "--setenv="+v)
		}
	}
	// After an upgrade of nbdctl there is another program at the path.
	args = append(args, "--", strings.TrimSuffix(program, " (deleted)"), Command)
	ctx, cancel := context.WithTimeout(context.Background(), unitPatience)
	defer cancel()
	if out, err := exec.CommandContext(ctx, systemdRun, args...).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("systemd-run: %w: %s", err, strings.TrimSpace(string(out)))
	}
	if err := l.SetDeadline(time.Now().Add(unitPatience)); err != nil {
		return nil, err
	}
	c, err := l.AcceptUnix()
	if err != nil {
		return nil, fmt.Errorf("%s.service does not come up (journalctl -u %[1]s): %w", unit, err)
	}
	return c, nil
}

// meet is the connection of a keeper that systemd has started to the process that it is for; nil:
// systemd has started it again.
func meet() (*net.UnixConn, error) {
	path := os.Getenv(meetVariable)
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED) {
		return nil, nil
	}
	return c, err
}
