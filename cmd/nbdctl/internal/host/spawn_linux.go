package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
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

	// One that goes on with a device has these in the place of a spec. Without the second, the
	// process that served it is dead.
	fileRecord = "record" // the Record of the process that serves the device, as JSON
	fileDevice = "device" // the socket over which the device comes

	fileBegan = "began" // one byte here tells that the program runs, if systemd has started it

	// A keeper has this alone, and whoever it starts has it beside the record.
	fileKeeper = "keeper" // the socket between a keeper and the process that serves
)

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
	l := legacy{apart: true}
	specW, reportR, acceptW := l.reads(fileSpec), l.writes(fileReport), l.reads(fileAccept)
	var secretsW *os.File
	if len(spec.Secrets) != 0 {
		secretsW = l.reads(fileSecrets)
	}
	cmd, err := l.start(image)
	if err != nil {
		return nil, nil, err
	}
	defer reportR.Close()
	s := &Spawned{cmd: cmd, accept: acceptW}

	// The pipe holds a spec many times over: this does not wait for the reader.
	err = errors.Join(json.NewEncoder(specW).Encode(spec), specW.Close())
	if secretsW != nil {
		err = errors.Join(err, spec.Secrets.Send(secretsW), secretsW.Close())
	}
	stop := context.AfterFunc(ctx, func() {
		// It undoes what it did and reports that; gone already is fine too.
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = reportR.SetReadDeadline(time.Now().Add(undoTimeout))
	})
	record, warnings, rerr := receive(reportR)
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

// RunSpawned is the serving process: it takes what Spawn gave it, serves, and
// returns when the device has gone.
func RunSpawned(
	ctx context.Context, store *Store,
	open func(context.Context, Spec) (*Backing, error),
	inherit func(context.Context, Spec, Inheritance) (*Backing, error),
) error {
	if unit := os.Getenv(unitVariable); unit != "" {
		return runUnit(ctx, store, unit)
	}
	files, err := inherited()
	if err != nil {
		return err
	}
	if began := files[fileBegan]; began != nil {
		if _, err := began.Write([]byte{1}); err != nil {
			return err // Whoever has started it does not wait any more.
		}
		began.Close()
	}
	switch {
	case files[fileDevice] != nil:
		return runSuccessor(ctx, store, files, inherit)
	case files[fileRecord] != nil:
		return runAttached(ctx, store, files, open, inherit)
	case files[fileKeeper] != nil:
		return runKeeper(ctx, store, files)
	}
	spec, err := receiveSpec(files)
	if err != nil {
		return err
	}
	if err := nameProcess(serverName); err != nil {
		return err
	}
	Publish()
	signals, stop := Signals()
	defer stop()

	reported := false
	h := &Host{Store: store, Spec: spec, Signals: signals, Open: opener(files, open)}
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

// serverName is what a serving process is called.
const serverName = "nbdctl"

// nameProcess says who this is, for ps, top and the kernel's log: exec has named it after the link.
func nameProcess(name string) error { return os.WriteFile("/proc/self/comm", []byte(name), 0) }

// receiveSpec reads what is to be served, with its secrets.
func receiveSpec(files map[string]*os.File) (spec Spec, err error) {
	if err := json.NewDecoder(files[fileSpec]).Decode(&spec); err != nil {
		return spec, fmt.Errorf("spec: %w", err)
	}
	spec.Secrets, err = receiveSecrets(files)
	return spec, errors.Join(err, files[fileSpec].Close())
}

// receiveSecrets reads the secrets of what is to be served, if it has any.
func receiveSecrets(files map[string]*os.File) (secret.Set, error) {
	f := files[fileSecrets]
	if f == nil {
		return nil, nil
	}
	defer f.Close()
	return secret.Receive(f)
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

// pending returns the signals that have come, also those of which the runtime has not told yet: it
// tells them in the order of their numbers (runtime/sigqueue.go), so that the one behind them all
// is the last.
func pending(signals <-chan os.Signal) (came []os.Signal) {
	const behind = syscall.SIGWINCH // which nobody minds
	told := make(chan os.Signal, 1)
	signal.Notify(told, behind)
	defer signal.Stop(told)
	if err := syscall.Kill(os.Getpid(), behind); err == nil {
		late := time.NewTimer(time.Second)
		defer late.Stop()
		select {
		case <-told:
		case <-late.C:
		}
	}
	for {
		select {
		case s := <-signals:
			came = append(came, s)
		default:
			return came
		}
	}
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
	if files[fileKeeper] != nil && len(files) == 1 {
		return files, os.Unsetenv(filesVariable)
	}
	if files[fileSpec] == nil && files[fileRecord] == nil || files[fileReport] == nil || files[fileAccept] == nil {
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
