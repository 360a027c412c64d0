package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
)

const (
	// leavePatience bounds the wait for the end of a process that has handed over its device.
	leavePatience = 10 * time.Second
	// givingUp is how long a process may take to end that gets no device.
	givingUp = 2 * time.Second
)

// Upgrade starts a process of this program that takes over the device of e, and returns its record
// when it serves. The strings are warnings for the user. After an error the process of e serves the
// device as if nothing had been, unless the error says otherwise.
func (e *Entry) Upgrade(ctx context.Context) (*Record, []string, error) {
	if e.Passage != passageVersion {
		return nil, nil, e.unpassable()
	}
	// One that is stopped shows that sooner when asked for less.
	if _, err := e.Status(ctx); err != nil {
		return nil, nil, err
	}
	old, err := e.living() // It is to be seen to its end.
	if err != nil {
		return nil, nil, err
	}
	if old != nil {
		defer old.close()
	}
	ours, theirs, err := socketPair()
	if err != nil {
		return nil, nil, err
	}
	defer ours.Close()
	l := legacy{apart: true}
	recordW, reportR, acceptW := l.reads(fileRecord), l.writes(fileReport), l.reads(fileAccept)
	l.add(fileDevice, theirs)
	cmd, err := l.start(-1)
	if err != nil {
		return nil, nil, err
	}
	defer reportR.Close()
	// With the end of this pipe it gives up, if the device is not its own yet.
	stop := context.AfterFunc(ctx, func() { acceptW.Close() })
	defer func() { stop(); acceptW.Close() }()
	successor := make(chan *reported, 1)
	go func() {
		successor <- listen(reportR)
	}()
	err = errors.Join(json.NewEncoder(recordW).Encode(e.Record), recordW.Close())
	if err == nil {
		_, err = e.ask(ctx, request{Op: opHandOver, File: ours})
	}
	ours.Close() // The successor hears that nobody hands over anything, if that is so.
	if err != nil {
		acceptW.Close()
	}
	return e.upgraded(ctx, err, successor, cmd, old)
}

// A reported process is one that has told how it has started.
type reported struct {
	record   *Record
	warnings []string
	err      error
	own      bool // the error is of its own making
}

// listen waits for the report of a process.
func listen(pipe io.Reader) *reported {
	r, err := read(pipe)
	if err == nil {
		err = r.err()
	}
	return &reported{r.Ready, r.Warnings, err, r.Error != "" && !r.Heard}
}

// upgraded says what has come of an upgrade. refused is why the process of e has not handed the
// device over. Where that process has not answered, the successor knows.
func (e *Entry) upgraded(
	ctx context.Context, refused error, telling <-chan *reported, cmd *exec.Cmd, old *process,
) (*Record, []string, error) {
	successor, err := e.outcome(ctx, refused, telling, cmd)
	if err != nil {
		return nil, nil, err
	}
	if successor.err != nil {
		ended(cmd)
		switch {
		case refused == nil:
			refused = fmt.Errorf("%s was handed over to pid %d, which has ended: %w; see nbdctl status %[1]s",
				e.Device(), cmd.Process.Pid, successor.err)
		case successor.own:
			refused = successor.err // with which the other process was refused
		}
		return nil, successor.warnings, refused
	}
	warnings := successor.warnings
	if err := cmd.Process.Release(); err != nil {
		warnings = append(warnings, err.Error())
	}
	if old != nil {
		late := fmt.Errorf("not within %s", leavePatience)
		ctx, cancel := context.WithTimeoutCause(ctx, leavePatience, late)
		defer cancel()
		if err := old.wait(ctx); err != nil {
			warnings = append(warnings, fmt.Sprintf("%s: pid %d has handed it over, and has not ended: %v",
				e.Device(), e.PID, err))
		}
	}
	return successor.record, warnings, nil
}

// outcome waits for the report of the successor. One that is of no use any more does not get much
// time for it.
func (e *Entry) outcome(
	ctx context.Context, refused error, telling <-chan *reported, cmd *exec.Cmd,
) (*reported, error) {
	var answered *exit.Error
	if errors.As(refused, &answered) {
		stop := time.AfterFunc(givingUp, func() { _ = cmd.Process.Kill() })
		defer stop.Stop()
		return <-telling, nil // which comes with its end
	}
	select {
	case r := <-telling:
		return r, nil
	case <-ctx.Done():
		return nil, errors.Join(refused, fmt.Errorf("pid %d does not tell whether it has %s now: %w",
			cmd.Process.Pid, e.Device(), context.Cause(ctx)))
	}
}

// unpassable says why the device of e can't be handed over to this program.
func (e *Entry) unpassable() error {
	if e.Passage == 0 {
		return exit.With(exit.Unsupported, "%s is served by an nbdctl that can't hand it over (pid %d): "+
			"disconnect and connect it once", e.Device(), e.PID)
	}
	return fmt.Errorf("%s: %w", e.Device(), unknownPassage(e.Passage))
}

// socketPair returns the two ends of a connection.
func socketPair() (a, b *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	return os.NewFile(uintptr(fds[0]), fileDevice), os.NewFile(uintptr(fds[1]), fileDevice), nil
}

// runSuccessor is the serving process that takes over from another one: it returns when the device
// has gone.
func runSuccessor(
	ctx context.Context, store *Store, files map[string]*os.File,
	inherit func(context.Context, Spec, Inheritance) (*Backing, error),
) error {
	var record Record
	err := json.NewDecoder(files[fileRecord]).Decode(&record)
	if err := errors.Join(err, files[fileRecord].Close(), nameProcess(serverName)); err != nil {
		return err
	}
	nc, err := net.FileConn(files[fileDevice])
	if err := errors.Join(err, files[fileDevice].Close()); err != nil {
		return err
	}
	defer nc.Close()
	Publish()
	signals, stop := Signals()
	defer stop()
	starting, giveUp := context.WithCancelCause(ctx)
	defer giveUp(nil)
	go func() { giveUp(accepted(starting, files[fileAccept])) }() // The starter never accepts: it goes.

	served := false
	h := &Host{Store: store, Signals: signals, Inherit: inherit}
	h.Ready = func(_ context.Context, r Record, warnings []string) error {
		served = true
		return errors.Join(h.logFile.captureStderr(),
			report{Ready: &r, Warnings: warnings}.send(files[fileReport]))
	}
	err = h.TakeOver(ctx, starting, nc.(*net.UnixConn), record)
	if served || err == nil {
		return err
	}
	return report{Error: err.Error(), Code: exit.Of(err), Heard: h.heard}.send(files[fileReport])
}
