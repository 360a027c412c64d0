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
)

// The serving process gets what it needs as open files with these names; a
// process that takes over from another will be given more of them.
const (
	fileSpec   = "spec"   // the Spec, as JSON
	fileReport = "report" // where its one report goes
)

// undoTimeout bounds the wait for a process that was asked to undo its start.
const undoTimeout = 30 * time.Second

// filesVariable lists the names of the inherited files, from descriptor 3 on.
const filesVariable = "NBDCTL_FILES"

// Spawn starts a process that serves spec in the background and waits until
// the device is ready. When ctx ends first the process is asked to undo what
// it did, and waited for.
func Spawn(ctx context.Context, spec Spec) (*Record, []string, error) {
	specR, specW, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	reportR, reportW, err := os.Pipe()
	if err != nil {
		return nil, nil, errors.Join(err, specR.Close(), specW.Close())
	}
	defer reportR.Close()

	// By this link it is the very program that runs now, even if another has
	// been installed at its path meanwhile.
	cmd := exec.Command("/proc/self/exe", Command)
	cmd.Args[0] = "nbdctl"
	cmd.Dir = "/" // not to keep the user's directory from being unmounted
	cmd.Env = append(os.Environ(), filesVariable+"="+fileSpec+":"+fileReport)
	cmd.ExtraFiles = []*os.File{specR, reportW}
	// Until it has its log, it complains where we do.
	cmd.Stderr = os.Stderr
	// A session of its own: the terminal's Ctrl-C and hang-up are not for it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	// What the caller has open, a lock or the pipe of a test runner, must not
	// stay open for the life of the device.
	err = closeOnExec()
	if err == nil {
		err = cmd.Start()
	}
	err = errors.Join(err, specR.Close(), reportW.Close())
	if err != nil {
		return nil, nil, errors.Join(err, specW.Close())
	}

	// The pipe holds a spec many times over: this does not wait for the reader.
	err = errors.Join(json.NewEncoder(specW).Encode(spec), specW.Close())
	stop := context.AfterFunc(ctx, func() {
		// It undoes what it did and reports that; gone already is fine too.
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = reportR.SetReadDeadline(time.Now().Add(undoTimeout))
	})
	record, warnings, rerr := receive(reportR)
	interrupted := !stop()
	switch {
	case errors.Is(rerr, os.ErrDeadlineExceeded):
		return nil, warnings, fmt.Errorf("%w; pid %d is still undoing what it did: see nbdctl list", context.Cause(ctx), cmd.Process.Pid)
	case err != nil || rerr != nil:
		// An unsuccessful exit status says nothing that the report did not.
		ended(cmd)
		return nil, warnings, errors.Join(err, rerr)
	case !interrupted:
		return record, warnings, cmd.Process.Release()
	case !ended(cmd):
		return nil, warnings, fmt.Errorf("%w, too late: %s is connected; nbdctl disconnect %[2]s ends it", context.Cause(ctx), record.Device())
	}
	// It was ready just before the signal reached it, and disconnected in order.
	return nil, warnings, context.Cause(ctx)
}

// Undo ends the device of a record that Spawn returned, because its user could
// not be told of it.
func Undo(r *Record) error {
	p, err := watchProcess(r.PID)
	if err != nil {
		return err
	}
	defer p.close()
	if err := syscall.Kill(r.PID, syscall.SIGTERM); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), undoTimeout)
	defer cancel()
	if err := p.wait(ctx); err != nil {
		return fmt.Errorf("%s stays connected: %w; nbdctl disconnect %[1]s ends it", r.Device(), err)
	}
	return nil
}

// ended waits for the process to end, but not for ever: it may be stuck in
// the kernel, or rightly go on because somebody holds its device.
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
func RunSpawned(ctx context.Context, store *Store, open func(Spec) (*Backing, error)) error {
	files, err := inherited()
	if err != nil {
		return err
	}
	var spec Spec
	if err := json.NewDecoder(files[fileSpec]).Decode(&spec); err != nil {
		return fmt.Errorf("spec: %w", err)
	}
	if err := files[fileSpec].Close(); err != nil {
		return err
	}
	// exec named us after the link; ps, top and the kernel's log should say
	// who this is.
	if err := os.WriteFile("/proc/self/comm", []byte("nbdctl"), 0); err != nil {
		return err
	}
	signals, stop := Signals()
	defer stop()

	reported := false
	h := &Host{Store: store, Spec: spec, Open: open, Signals: signals}
	h.Ready = func(r Record, warnings []string) error {
		reported = true
		// What the runtime says when it crashes is to be found in the log;
		// nothing else holds the starter's terminal or pipes.
		if err := h.logFile.captureStderr(); err != nil {
			return err
		}
		return report{Ready: &r, Warnings: warnings}.send(files[fileReport])
	}
	err = h.Serve(ctx)
	if reported || err == nil {
		return err
	}
	return report{Error: err.Error(), Code: exit.Of(err)}.send(files[fileReport])
}

// Signals returns the signals that ask a serving process to end, and prepares
// the process to be one: files are made for all to read, and a log or a
// terminal that has gone does not kill it. The function undoes the first.
func Signals() (<-chan os.Signal, func()) {
	unix.Umask(0o022)
	signal.Ignore(syscall.SIGPIPE)
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	return signals, func() { signal.Stop(signals) }
}

// inherited returns the files that Spawn passed, by their names.
func inherited() (map[string]*os.File, error) {
	const first = 3 // exec.Cmd.ExtraFiles
	files := make(map[string]*os.File)
	for i, name := range strings.Split(os.Getenv(filesVariable), ":") {
		// What we execute has no business with them.
		syscall.CloseOnExec(first + i)
		files[name] = os.NewFile(uintptr(first+i), name)
	}
	if files[fileSpec] == nil || files[fileReport] == nil {
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
