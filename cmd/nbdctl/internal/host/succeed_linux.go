package host

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// A process that serves clients is started by whoever supervises it, and looks after it by its
// number. So the first one stays when another one serves in its place, and does nothing but to pass
// on signals and, in the end, the exit code. Those between it and the one that serves end.

// The files of a process that serves clients in the place of another one.
const (
	fileServer = "server" // the socket over which it gets all
	fileFirst  = "first"  // where it tells the first one its number, in a line
)

// A Successor is a process that is to serve clients in the place of this one.
type Successor struct {
	// Conn is a connection to it.
	Conn *net.UnixConn

	cmd   *exec.Cmd
	first *os.File // nil: this process is the first, which hears from
	hears *os.File

	log     *slog.Logger
	heard   []byte // the beginning of a line
	serving int    // the process that has told last that it serves
}

// A Succession is what a process has of the one before it.
type Succession struct {
	Conn  *net.UnixConn
	first *os.File
}

// Succeeding returns the Succession of a process that another one has started for that; nil: it was
// not.
func Succeeding() (*Succession, error) {
	names := strings.Split(os.Getenv(filesVariable), ":")
	if len(names) != 2 || names[0] != fileServer || names[1] != fileFirst {
		return nil, nil
	}
	if err := errors.Join(os.Unsetenv(filesVariable), nameProcess(serverName)); err != nil {
		return nil, err
	}
	var files [2]*os.File
	for i, name := range names {
		syscall.CloseOnExec(firstFile + i)
		files[i] = os.NewFile(uintptr(firstFile+i), name)
	}
	nc, err := net.FileConn(files[0])
	if err := errors.Join(err, files[0].Close()); err != nil {
		return nil, err
	}
	return &Succession{nc.(*net.UnixConn), files[1]}, nil
}

// Served tells the first process that this one serves. The Succession goes on to the next process.
func (s *Succession) Served() error {
	_, err := fmt.Fprintln(s.first, os.Getpid())
	return err
}

// Succeed starts a program with the arguments of this one, to serve in its place. before is how
// this one came to serve; nil: by itself.
func Succeed(program *os.File, before *Succession) (_ *Successor, err error) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return nil, os.NewSyscallError("prctl", err)
	}
	ours, theirs, err := socketPair()
	if err != nil {
		return nil, err
	}
	defer ours.Close()
	defer theirs.Close()
	s := new(Successor)
	tells := (*os.File)(nil)
	if before != nil {
		s.first, tells = before.first, before.first
	} else {
		if s.hears, tells, err = os.Pipe(); err != nil {
			return nil, err
		}
		defer tells.Close()
	}
	nc, err := net.FileConn(ours)
	if err != nil {
		return nil, errors.Join(err, closeFile(s.hears))
	}
	s.Conn = nc.(*net.UnixConn)
	// The descriptor has another number in the new process before that executes it.
	s.cmd = exec.Command(fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), program.Fd()))
	s.cmd.Args = os.Args
	s.cmd.Env = append(os.Environ(), filesVariable+"="+fileServer+":"+fileFirst)
	s.cmd.Stdin, s.cmd.Stdout, s.cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	s.cmd.ExtraFiles = []*os.File{theirs, tells}
	err = closeOnExec()
	if err == nil {
		err = s.cmd.Start()
	}
	if err != nil {
		return nil, errors.Join(err, nc.Close(), closeFile(s.hears))
	}
	return s, nil
}

// PID returns the number of the process.
func (s *Successor) PID() int { return s.cmd.Process.Pid }

// Signal passes a signal on to the process; nil is none. A nil Successor is nobody.
func (s *Successor) Signal(sig os.Signal, log *slog.Logger) {
	if s == nil || sig == nil {
		return
	}
	err := s.cmd.Process.Signal(sig) // It may have ended.
	log.Info("passed on", slog.String("signal", sig.String()), slog.Int("pid", s.PID()), slog.Any("err", err))
}

// End ends a process that is not to serve.
func (s *Successor) End() {
	s.Conn.Close()
	_ = s.cmd.Process.Kill() // It may have ended.
	_ = s.cmd.Wait()
	_ = closeFile(s.hears)
}

// Wait returns the exit code of the last process that serves in the place of this one, and passes
// signals on to that, until left is closed, too. A process that is not the first waits for that
// alone.
func (s *Successor) Wait(signals <-chan os.Signal, left <-chan struct{}, log *slog.Logger) int {
	s.Conn.Close()
	s.log = log
	s.serving = s.PID()
	ended, code := make(chan int, 1), 0
	if s.hears != nil {
		go func() { ended <- reap() }()
	} else {
		ended <- 0
	}
	for left != nil || ended != nil {
		select {
		case sig := <-signals:
			s.pass(sig)
		case code = <-ended:
			ended = nil
		case <-left:
			left = nil
		}
	}
	for _, sig := range pending(signals) { // What came in the last moment is for the next one, too.
		s.pass(sig)
	}
	return code
}

// pass passes a signal on to the process that serves. One that has just handed over may not be able
// to pass it on any more, but the next one has told its number before that.
func (s *Successor) pass(sig os.Signal) {
	number, ok := sig.(syscall.Signal)
	if !ok {
		return
	}
	s.hear()
	for pid := 0; pid != s.serving; s.hear() {
		pid = s.serving
		err := syscall.Kill(pid, number) // It may have ended.
		s.log.Info("passed on", slog.String("signal", number.String()), slog.Int("pid", pid), slog.Any("err", err))
	}
}

// hear reads which process serves, if that has changed.
func (s *Successor) hear() {
	if s.hears == nil {
		return
	}
	raw, err := s.hears.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Read(func(fd uintptr) bool { // At the end of all it fails, and then nobody serves.
		var b [256]byte
		for {
			n, err := unix.Read(int(fd), b[:])
			if n <= 0 || err != nil {
				return true
			}
			s.heard = append(s.heard, b[:n]...)
		}
	})
	lines := strings.Split(string(s.heard), "\n")
	s.heard = []byte(lines[len(lines)-1])
	for _, line := range lines[:len(lines)-1] {
		if pid, err := strconv.Atoi(line); err == nil {
			s.serving = pid
		}
	}
}

// reap waits until no child is left, and returns the exit code of the last one.
func reap() (code int) {
	for {
		var status unix.WaitStatus
		_, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return code
		case status.Signaled():
			code = 128 + int(status.Signal())
		case status.Exited():
			code = status.ExitStatus()
		}
	}
}
