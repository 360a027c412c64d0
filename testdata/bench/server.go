package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// A role says what a server's numbers are for.
type role string

const (
	floor   role = "floor"   // what all others are measured against
	ours    role = "ours"    // under test
	peer    role = "peer"    // compared with
	variant role = "variant" // under test for one goal
)

// A server is a program to be measured.
type server struct {
	name string
	role role
	// export is the name that the client asks for.
	export string
	env    []string
	// tls tells that clients have to use it.
	tls bool
	// structured has clients ask for structured replies in all timed runs.
	structured bool
	// daemon tells that the program goes into the background and leaves its process id in a file.
	daemon bool
	// command says how to start it.
	command func(w *workspace, at place) ([]string, error)
}

// A place is where one instance of a server listens and keeps its things.
type place struct {
	network string // unix or tcp
	address string // path, or host and port
	image   string // a file that does not exist yet, without its extension; in memory or on the disk
	used    int64  // bytes of the image that will be
	pidFile string
}

func (p place) url() string { return p.network + ":" + p.address }

// A process is a server that runs.
type process struct {
	server
	at     place
	pid    int
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	stdout *bufio.Reader
	said   *strings.Builder // on stderr
	exited chan struct{}    // of cmd
}

// startPatience bounds how long a server may take until it listens, and how long to end.
const startPatience = 10 * time.Second

// start runs a server on the processor cpu, or on all if it is negative, and returns when it
// accepts connections.
func (s server) start(ctx context.Context, w *workspace, at place, cpu int) (*process, error) {
	argv, err := s.command(w, at)
	if err != nil {
		return nil, err
	}
	argv = pin(argv, cpu)
	p := &process{server: s, at: at, said: new(strings.Builder), exited: make(chan struct{})}
	p.cmd = exec.Command(argv[0], argv[1:]...)
	p.cmd.Env = append(os.Environ(), s.env...)
	p.cmd.Stderr = p.said
	// A driver that is killed takes its servers along; those in the background stay.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p.stdout = bufio.NewReader(stdout)
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	p.pid = p.cmd.Process.Pid
	go func() {
		_ = p.cmd.Wait() // How a server ends is not what is measured.
		close(p.exited)
	}()
	if err := p.await(ctx); err != nil {
		p.stop()
		return nil, fmt.Errorf("%w: %s", err, strings.TrimSpace(p.said.String()))
	}
	return p, nil
}

// await returns when the server accepts connections. Programs of others tell nobody when they do,
// so it asks.
func (p *process) await(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startPatience)
	defer cancel()
	again := time.NewTicker(20 * time.Millisecond)
	defer again.Stop()
	exited := p.exited
	if p.daemon {
		exited = nil
	}
	for {
		nc, err := net.Dial(p.at.network, p.at.address)
		if err == nil {
			nc.Close()
			return p.readPID()
		}
		select {
		case <-again.C:
		case <-exited:
			return errors.New("ended at once")
		case <-ctx.Done():
			return fmt.Errorf("does not listen: %w", err)
		}
	}
}

func (p *process) readPID() error {
	if !p.daemon {
		return nil
	}
	b, err := os.ReadFile(p.at.pidFile)
	if err != nil {
		return err
	}
	p.pid, err = strconv.Atoi(strings.TrimSpace(string(b)))
	return err
}

// stop ends the server, and waits until it has.
func (p *process) stop() {
	if p.daemon {
		p.stopDaemon()
		return
	}
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // It may have ended by itself, which is as well.
	select {
	case <-p.exited:
	case <-time.After(startPatience):
		_ = p.cmd.Process.Kill()
		<-p.exited
	}
}

// adoptOrphans makes daemons children of this process when their parents have ended, so that it can
// wait for them.
func adoptOrphans() error {
	const setChildSubreaper = 36 // PR_SET_CHILD_SUBREAPER of linux/prctl.h
	if _, _, errno := syscall.RawSyscall(syscall.SYS_PRCTL, setChildSubreaper, 1, 0); errno != 0 {
		return os.NewSyscallError("prctl", errno)
	}
	return nil
}

// stopDaemon ends a daemon and the processes that it made. As daemons are, it is the leader of its
// process group.
func (p *process) stopDaemon() {
	if p.pid == p.cmd.Process.Pid {
		return // It never got so far.
	}
	_ = syscall.Kill(-p.pid, syscall.SIGKILL) // They may have ended by themselves.
	for {
		if _, err := syscall.Wait4(-p.pid, nil, 0, nil); err != nil && err != syscall.EINTR {
			return
		}
	}
}

// allocations asks a goserver how many objects it has allocated.
func (p *process) allocations() (float64, error) {
	if _, err := fmt.Fprintln(p.stdin); err != nil {
		return 0, err
	}
	line, err := p.stdout.ReadString('\n')
	if err != nil {
		return 0, err
	}
	return strconv.ParseFloat(strings.TrimSpace(line), 64)
}

// pin makes a command run on one processor, or on all if cpu is negative.
func pin(argv []string, cpu int) []string {
	if cpu < 0 {
		return argv
	}
	return append([]string{"taskset", "-c", strconv.Itoa(cpu)}, argv...)
}

// placeFor finds a place for a server: its socket in dir, its image in images; so many bytes of
// that will be used.
func placeFor(s server, network, dir, images string, used int64) (place, error) {
	name := strings.ReplaceAll(s.name, " ", "")
	at := place{
		network: network,
		address: filepath.Join(dir, name),
		image:   filepath.Join(images, name),
		used:    used,
		pidFile: filepath.Join(dir, name+".pid"),
	}
	if network == "unix" {
		return at, nil
	}
	// The port is free now and is not taken by others within a moment: ports are given out in turn.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return at, err
	}
	at.address = l.Addr().String()
	return at, l.Close()
}
