package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/secret"
)

// The serving process gets what it needs as open files with these names; a
// process that takes over from another will be given more of them.
const (
	fileSpec    = "spec"    // the Spec, as JSON
	fileSecrets = "secrets" // its Secrets; absent if there are none
	fileReport  = "report"  // where its one report goes
	fileAccept  = "accept"  // one byte here lets it keep the device, the end of the file does not
	fileImage   = "image"   // what the Spec calls by the number that it has, as /dev/fd/7
)

// undoTimeout bounds the wait for a process that was asked to undo its start,
// which itself gives up after half a minute.
const undoTimeout = 45 * time.Second

// filesVariable lists the names of the inherited files, from descriptor 3 on. A number
// that is not in use has an empty name.
const filesVariable = "NBDCTL_FILES"

// firstFile is the descriptor of the first of them (exec.Cmd.ExtraFiles).
const firstFile = 3

// Spawned is a device that a process in the background serves on condition. Unless
// Accept is called, the process undoes all it did, even if the caller is killed.
type Spawned struct {
	Record *Record
	cmd    *exec.Cmd
	accept *os.File
}

// Accept lets the process keep its device, for now the user knows of it.
func (s *Spawned) Accept() error {
	_, err := s.accept.Write([]byte{1})
	err = errors.Join(err, s.accept.Close(), s.cmd.Process.Release())
	if err != nil {
		return fmt.Errorf("%s: the serving process has ended: %w", s.Record.Device(), err)
	}
	return nil
}

// Reject has the process undo what it did, and waits for that.
func (s *Spawned) Reject() error {
	err := s.accept.Close()
	if !ended(s.cmd) {
		err = errors.Join(err, fmt.Errorf("pid %d is still undoing what it did: see nbdctl list", s.cmd.Process.Pid))
	}
	return err
}

// Spawn starts a process that serves spec in the background and waits until the
// device is ready; the strings are warnings for the user. When ctx ends first, the
// process is asked to undo what it did, and waited for. The process inherits the
// descriptor image, with its number, until it has opened the backend. A negative
// image is none.
func Spawn(ctx context.Context, spec Spec, image int) (*Spawned, []string, error) {
	cmd, pipes, err := start(image, len(spec.Secrets) != 0)
	if err != nil {
		return nil, nil, err
	}
	defer pipes.report.Close()
	s := &Spawned{cmd: cmd, accept: pipes.accept}

	// The pipe holds a spec many times over: this does not wait for the reader.
	err = errors.Join(json.NewEncoder(pipes.spec).Encode(spec), pipes.spec.Close())
	if pipes.secrets != nil {
		err = errors.Join(err, spec.Secrets.Send(pipes.secrets), pipes.secrets.Close())
	}
	stop := context.AfterFunc(ctx, func() {
		// It undoes what it did and reports that; gone already is fine too.
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = pipes.report.SetReadDeadline(time.Now().Add(undoTimeout))
	})
	record, warnings, rerr := receive(pipes.report)
	if !stop() && rerr == nil {
		// It was ready just before the signal reached it.
		rerr = context.Cause(ctx)
	}
	if errors.Is(rerr, os.ErrDeadlineExceeded) {
		err = fmt.Errorf("%w; pid %d is still undoing what it did: see nbdctl list",
			context.Cause(ctx), cmd.Process.Pid)
		return nil, warnings, errors.Join(err, s.accept.Close())
	}
	if err = errors.Join(err, rerr); err != nil {
		return nil, warnings, errors.Join(err, s.Reject())
	}
	s.Record = record
	return s, warnings, nil
}

// pipes are the starter's ends of what the serving process inherits.
type pipes struct{ spec, secrets, report, accept *os.File }

// start starts the serving process, with a pipe for secrets if there are some.
func start(image int, secrets bool) (_ *exec.Cmd, _ *pipes, err error) {
	var opened []*os.File
	defer func() {
		if err != nil {
			for _, f := range opened {
				f.Close()
			}
		}
	}()
	pipe := func() (r, w *os.File) {
		if err == nil {
			if r, w, err = os.Pipe(); err == nil {
				opened = append(opened, r, w)
			}
		}
		return r, w
	}
	specR, specW := pipe()
	reportR, reportW := pipe()
	acceptR, acceptW := pipe()
	names, files := []string{fileSpec, fileReport, fileAccept}, []*os.File{specR, reportW, acceptR}
	var secretsW *os.File
	if secrets {
		var secretsR *os.File
		secretsR, secretsW = pipe()
		names, files = append(names, fileSecrets), append(files, secretsR)
	}
	if err != nil {
		return nil, nil, err
	}
	// By this link it is the very program that runs now, even if another has
	// been installed at its path meanwhile.
	cmd := exec.Command("/proc/self/exe", Command)
	cmd.Args[0] = "nbdctl"
	cmd.Dir = "/" // not to keep the user's directory from being unmounted
	names, cmd.ExtraFiles = layout(names, files, image)
	if image == 0 {
		cmd.Stdin = os.Stdin
	}
	cmd.Env = append(os.Environ(), filesVariable+"="+strings.Join(names, ":"))
	// Until it has its log, it complains where we do.
	cmd.Stderr = os.Stderr
	// A session of its own: the terminal's Ctrl-C and hang-up are not for it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	// What the caller has open, a lock or the pipe of a test runner, must not
	// stay open for as long as the device is connected.
	if err = closeOnExec(); err != nil {
		return nil, nil, err
	}
	if err = cmd.Start(); err != nil {
		return nil, nil, err
	}
	for _, theirs := range cmd.ExtraFiles {
		closeFile(theirs) // They have copies.
	}
	return cmd, &pipes{specW, secretsW, reportR, acceptW}, nil
}

// ended waits for the process to end, but not for ever: it may be stuck in
// the kernel.
func ended(cmd *exec.Cmd) bool {
	done := make(chan struct{})
	go func() {
		_ = cmd.Wait() // its report has said all
		close(done)
	}()
	timer := time.NewTimer(undoTimeout)
	defer timer.Stop()
	select {
	case <-done:
		return true
	case <-timer.C:
		return false
	}
}

// closeOnExec marks every descriptor but the standard ones to be closed in
// the programs that this one starts. Those that exec passes on are copies.
func closeOnExec() error {
	err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC)
	if err == nil {
		return nil
	}
	// Before Linux 5.11.
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return err
	}
	for _, d := range fds {
		if fd, err := strconv.Atoi(d.Name()); err == nil && fd > 2 {
			syscall.CloseOnExec(fd)
		}
	}
	return nil
}

// RunSpawned is the serving process: it takes what Spawn gave it, serves, and
// returns when the device has gone.
func RunSpawned(ctx context.Context, store *Store, open func(context.Context, Spec) (*Backing, error)) error {
	files, err := inherited()
	if err != nil {
		return err
	}
	spec, err := receiveSpec(files)
	if err != nil {
		return err
	}
	// exec named us after the link; ps, top and the kernel's log should say
	// who this is.
	if err := os.WriteFile("/proc/self/comm", []byte("nbdctl"), 0); err != nil {
		return err
	}
	Publish()
	signals, stop := Signals()
	defer stop()

	reported := false
	h := &Host{Store: store, Spec: spec, Signals: signals}
	h.Open = func(ctx context.Context, s Spec) (*Backing, error) {
		backing, err := open(ctx, s)
		// An image that was inherited has been opened anew, by its number. To keep it
		// would do no harm.
		_, _ = forgetStdin(), closeFile(files[fileImage])
		return backing, err
	}
	h.Ready = func(ctx context.Context, r Record, warnings []string) error {
		reported = true
		// What the runtime says when it crashes is to be found in the log;
		// nothing else holds the starter's terminal or pipes.
		if err := h.logFile.captureStderr(); err != nil {
			return err
		}
		if err := (report{Ready: &r, Warnings: warnings}).send(files[fileReport]); err != nil {
			return err
		}
		return accepted(ctx, files[fileAccept])
	}
	err = h.Serve(ctx)
	if reported || err == nil {
		return err
	}
	return report{Error: err.Error(), Code: exit.Of(err)}.send(files[fileReport])
}

// receiveSpec reads what is to be served, with its secrets.
func receiveSpec(files map[string]*os.File) (spec Spec, err error) {
	if err := json.NewDecoder(files[fileSpec]).Decode(&spec); err != nil {
		return spec, fmt.Errorf("spec: %w", err)
	}
	if files[fileSecrets] != nil {
		if spec.Secrets, err = secret.Receive(files[fileSecrets]); err != nil {
			return spec, err
		}
	}
	return spec, errors.Join(files[fileSpec].Close(), closeFile(files[fileSecrets]))
}

// accepted waits until the starter accepts the device. The error says that it
// did not, because it has given up or died, or that ctx ended first.
func accepted(ctx context.Context, pipe *os.File) error {
	defer pipe.Close()
	raw, err := pipe.SyscallConn()
	if err != nil {
		return err
	}
	var n int
	read := func(fd uintptr) bool {
		var b [1]byte
		n, err = unix.Read(int(fd), b[:])
		return err != unix.EAGAIN
	}
	stop := context.AfterFunc(ctx, func() { _ = pipe.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	if werr := raw.Read(read); werr != nil {
		// ctx may have ended at the moment of acceptance. Then the device is accepted:
		// the starter may have succeeded, and its user may have written to the device.
		if cerr := raw.Control(func(fd uintptr) { read(fd) }); cerr != nil || err == unix.EAGAIN {
			return errors.Join(context.Cause(ctx), cerr)
		}
	}
	if err == nil && n == 0 {
		return errors.New("the starter has given up")
	}
	return err
}

// Signals returns the signals that ask a serving process to end, and keeps a log or
// a terminal that has gone from killing it. The function undoes the first.
func Signals() (<-chan os.Signal, func()) {
	signal.Ignore(syscall.SIGPIPE)
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, Heeded(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)...)
	return signals, func() { signal.Stop(signals) }
}

// Publish has the process make its files for all to read, as lists do.
func Publish() { unix.Umask(0o022) }

// Privately has f make files that are for this user alone. No other goroutine makes any meanwhile.
func Privately(f func()) {
	defer unix.Umask(unix.Umask(0o177))
	f()
}

// ignoreStops keeps a terminal, with its Ctrl-Z, from stopping the process.
func ignoreStops() { signal.Ignore(syscall.SIGTSTP, syscall.SIGTTIN, syscall.SIGTTOU) }

// inherited returns the files that Spawn passed, by their names.
func inherited() (map[string]*os.File, error) {
	files := make(map[string]*os.File)
	for i, name := range strings.Split(os.Getenv(filesVariable), ":") {
		if name == "" {
			continue
		}
		// What we execute has no business with them.
		syscall.CloseOnExec(firstFile + i)
		// It is for reads that can be interrupted. The other ends of the pipes do not
		// share this flag; the image shares it with its other users.
		if name != fileImage {
			if err := syscall.SetNonblock(firstFile+i, true); err != nil {
				continue // not one of ours
			}
		}
		files[name] = os.NewFile(uintptr(firstFile+i), name)
	}
	if files[fileSpec] == nil || files[fileReport] == nil || files[fileAccept] == nil {
		return nil, errors.New(Command + " is how nbdctl starts itself, not for use by hand")
	}
	return files, os.Unsetenv(filesVariable)
}

// redirectStderr makes f the standard error of the whole process.
func redirectStderr(f *os.File) error {
	if err := withDescriptor(f, func(fd uintptr) error { return unix.Dup3(int(fd), 2, 0) }); err != nil {
		return fmt.Errorf("detach: %w", err)
	}
	return nil
}
