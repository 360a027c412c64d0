package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/parcel"
)

// keeperName is what a keeper is called in ps, top and the kernel's log.
const keeperName = "nbdctl-keeper"

// startPatience bounds what a process may take to go on with a device. A server elsewhere that is
// dialled may take half of it.
const startPatience = time.Minute

// restartPause is how long the keeper waits after a process has failed to go on with a device,
// twice as long each time up to 13 s.
const restartPause = 100 * time.Millisecond

// startKeeper starts a keeper, in a unit of systemd where there is that, and returns the connection
// to it.
func startKeeper() (*net.UnixConn, error) {
	if run := systemdRun(); run != "" {
		c, err := startUnit(run)
		if err == nil {
			return c, nil
		}
		fmt.Fprintln(os.Stderr, "nbdctl: the keeper is a process without a unit:", err)
	}
	ours, theirs, err := socketPair()
	if err != nil {
		return nil, err
	}
	defer ours.Close()
	var l legacy
	l.add(fileKeeper, theirs)
	cmd, err := l.start(-1)
	if err != nil {
		return nil, err
	}
	go func() { _ = cmd.Wait() }() // The end of the connection tells.
	return unixConn(ours)
}

// unixConn makes a connection of a copy of f.
func unixConn(f *os.File) (*net.UnixConn, error) {
	nc, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	c, ok := nc.(*net.UnixConn)
	if !ok {
		nc.Close()
		return nil, fmt.Errorf("%s is no Unix socket", f.Name())
	}
	return c, nil
}

// A keeper is a process that has another one take the place of a serving process which dies. It
// keeps the estate of that, and touches no request. It ends when it is released, when nobody is to
// take the place any more, and when there is nothing left to serve.
type keeper struct {
	store    *Store
	estate   *estate
	dir      string
	lock     *os.File // of the file that tells of it
	logFile  *logFile
	log      *slog.Logger
	restarts budget
	signals  chan os.Signal
	unit     string   // of systemd; "": it is in none
	fds      *fdStore // of the unit
}

// newKeeper makes this process a keeper, in a unit of that name.
func newKeeper(store *Store, unit string) (*keeper, error) {
	k := &keeper{store: store, unit: unit, signals: make(chan os.Signal, 1)}
	// It is its device's end that ends it, and not a signal for all processes. What it ignored
	// would be ignored by those that it starts.
	signal.Notify(k.signals, Heeded(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGPIPE)...)
	Publish()
	return k, nameProcess(keeperName)
}

// runKeeper is the process of a keeper.
func runKeeper(ctx context.Context, store *Store, files map[string]*os.File) error {
	k, err := newKeeper(store, "")
	if err != nil {
		return err
	}
	c, err := unixConn(files[fileKeeper])
	if err := errors.Join(err, files[fileKeeper].Close()); err != nil {
		return err
	}
	return k.run(ctx, c)
}

// runUnit is the process of a keeper in a unit of systemd, which starts it again with its estate if
// it dies.
func runUnit(ctx context.Context, store *Store, unit string) error {
	k, err := newKeeper(store, unit)
	if err != nil {
		return err
	}
	if k.fds, err = openStore(); err != nil {
		return err
	}
	e, err := stored()
	if err != nil {
		return err
	}
	if e != nil {
		return k.goOn(ctx, e)
	}
	c, err := meet()
	if c == nil || err != nil {
		return err
	}
	return k.run(ctx, c)
}

// goOn goes on after a keeper that has died. If the serving process is alive, that has another
// keeper, or will have: for some time this one waits for its death.
func (k *keeper) goOn(ctx context.Context, e *estate) error {
	k.estate = e
	defer k.close()
	patience, cancel := context.WithTimeout(ctx, keeperPatience)
	defer cancel()
	l, err := lockWait(patience, filepath.Join(k.store.dir, e.UUID, "lock"))
	if err != nil {
		return nil
	}
	l.Close()
	// Lists show it when a process serves by its doing: another keeper may be at it, too.
	if err := k.open(); err != nil {
		return err
	}
	k.log.Error("the keeper has died, and so has the serving process", "unit", k.unit)
	if c := k.replace(ctx); c != nil {
		return k.run(ctx, c)
	}
	return nil
}

// run keeps what the process at the other end of c gives it.
func (k *keeper) run(ctx context.Context, c *net.UnixConn) error {
	defer k.close()
	for c != nil {
		released := k.attend(c)
		c.Close()
		if released || k.estate == nil {
			return nil
		}
		c = k.replace(ctx)
	}
	return nil
}

func (k *keeper) close() {
	k.estate.close()
	k.fds.close()
	if k.lock != nil {
		k.lock.Close()
	}
	if k.logFile != nil {
		k.logFile.Close()
	}
}

// attend heeds the process at the other end of c until that has gone. It returns whether the keeper
// is not needed any more.
func (k *keeper) attend(c *net.UnixConn) (released bool) {
	for {
		w, err := receiveWill(c)
		switch {
		case err != nil:
			return false
		case w.Released:
			return true
		case w.Estate == nil:
			continue
		}
		k.estate.close()
		k.estate = w.Estate
		if err := k.appear(); err != nil {
			fmt.Fprintln(os.Stderr, "nbdctl: keeper:", err)
			return true // which the other process takes for its end
		}
		if err := k.fds.put(k.estate); err != nil {
			k.log.Error("systemd does not have the descriptors, if this keeper dies", "error", err)
		}
		if parcel.Send(c, struct{}{}, nil) != nil {
			return false
		}
	}
}

// open opens what the keeper has of the device itself.
func (k *keeper) open() error {
	if k.log != nil {
		return nil
	}
	k.dir = filepath.Join(k.store.dir, k.estate.UUID)
	r, err := readRecord(k.dir)
	if err != nil {
		return err
	}
	mode := os.FileMode(0o644)
	if len(k.estate.Secrets) != 0 {
		mode = 0o600
	}
	if k.logFile, err = openLog(r.Log, mode); err != nil {
		return err
	}
	if err := k.logFile.captureStderr(); err != nil {
		return err
	}
	k.log = newLogger(k.logFile, nil).With("device", r.Device(), "keeper", os.Getpid())
	go k.passOn(k.dir)
	return nil
}

// appear has lists show the keeper.
func (k *keeper) appear() error {
	if err := k.open(); err != nil || k.shown() {
		return err
	}
	if k.lock != nil {
		k.lock.Close()
	}
	// Another one of this device, which is to end, has a file of its own.
	prepared := filepath.Join(k.dir, fmt.Sprintf(".keeper-%d", os.Getpid()))
	var err error
	if k.lock, err = os.OpenFile(prepared, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644); err != nil {
		return err
	}
	if err := errors.Join(lock(k.lock), k.tell()); err != nil {
		return err
	}
	return os.Rename(prepared, filepath.Join(k.dir, keeperFile))
}

// shown reports whether lists show it, and not another keeper, which may have gone.
func (k *keeper) shown() bool {
	if k.lock == nil {
		return false
	}
	ours, err1 := k.lock.Stat()
	there, err2 := os.Stat(filepath.Join(k.dir, keeperFile))
	return err1 == nil && err2 == nil && os.SameFile(ours, there)
}

// passOn has the serving process asked to end when somebody stops the unit of the keeper.
func (k *keeper) passOn(dir string) {
	for s := range k.signals {
		if k.unit == "" || s != syscall.SIGTERM {
			continue
		}
		r, err := readRecord(dir)
		if err == nil {
			k.log.Info("asked to stop, and so is the serving process", "unit", k.unit, "pid", r.PID)
			err = signalServing(r.PID, dir, s)
		}
		if err != nil {
			k.log.Warn("the serving process was not asked", "reason", err)
		}
	}
}

// tell writes what lists show.
func (k *keeper) tell() error {
	b, err := json.Marshal(Keeper{PID: os.Getpid(), Unit: k.unit})
	if err != nil {
		return err
	}
	_, err = k.lock.WriteAt(append(b, '\n'), 0) // It never gets shorter.
	return err
}

// replace has another process serve the device, and returns the connection to it; nil: nobody
// serves it any more, and nobody is to.
func (k *keeper) replace(ctx context.Context) *net.UnixConn {
	for attempt := 0; ; attempt++ {
		// The lock is free when all threads have gone, also one that is stuck in a write.
		l, err := lockWait(ctx, filepath.Join(k.dir, "lock"))
		if err != nil {
			k.log.Info("the device has gone", "reason", err)
			return nil
		}
		l.Close()
		if !k.restarts.take(k.estate.Spec.Restart, time.Now()) {
			k.giveUp(ctx)
			return nil
		}
		k.log.Error("the serving process has died, another one takes its place")
		// What is asked of the device meanwhile is to wait for that one.
		if err := k.estate.Device.Cut(k.estate.of(passDevice)); err != nil {
			k.log.Warn("connections were not cut", "reason", err)
		}
		c, err := k.start(ctx)
		if err == nil {
			return c
		}
		k.log.Error("no process has taken its place", "reason", err)
		switch exit.Of(err) {
		case exit.NotFound, exit.Busy: // The device has gone, or somebody else has attached it.
			return nil
		}
		select {
		case <-time.After(restartPause << min(attempt, 7)):
		case <-ctx.Done():
			return nil
		}
	}
}

// start starts a process that goes on with the device.
func (k *keeper) start(ctx context.Context) (_ *net.UnixConn, err error) {
	r, err := readRecord(k.dir)
	if err != nil {
		return nil, err
	}
	ours, theirs, err := socketPair()
	if err != nil {
		return nil, err
	}
	defer ours.Close()
	l := legacy{env: k.estate.Environ}
	recordW, reportR, acceptW := l.reads(fileRecord), l.writes(fileReport), l.reads(fileAccept)
	l.add(fileKeeper, theirs)
	cmd, err := l.start(-1)
	if err != nil {
		return nil, err
	}
	defer reportR.Close()
	defer acceptW.Close()
	c, err := unixConn(ours)
	err = errors.Join(err, json.NewEncoder(recordW).Encode(r), recordW.Close())
	if err == nil {
		err = k.estate.send(c)
	}
	if err != nil && c != nil {
		c.Close()
		c = nil
	}
	late := time.AfterFunc(startPatience, func() { _ = cmd.Process.Kill() })
	told := listen(reportR)
	if !late.Stop() {
		err = errors.Join(err, fmt.Errorf("pid %d has not come up within %s", cmd.Process.Pid, startPatience))
	}
	if err = errors.Join(err, told.err); err != nil {
		ended(cmd)
		if c != nil {
			c.Close()
		}
		return nil, err
	}
	go k.reap(cmd)
	return c, nil
}

// reap tells how a process has ended.
func (k *keeper) reap(cmd *exec.Cmd) {
	_ = cmd.Wait()
	k.log.Info("the process has ended", "pid", cmd.Process.Pid, "how", cmd.ProcessState.String())
}

// giveUp ends the device, which nobody is to serve any more.
func (k *keeper) giveUp(ctx context.Context) {
	l, err := lockTry(filepath.Join(k.dir, "lock"))
	if err != nil {
		return // Somebody serves it.
	}
	defer l.Close()
	r, err := readRecord(k.dir)
	if err != nil {
		return
	}
	// The kernel sees then that nobody answers. It could wait for a socket that is full.
	k.estate.close()
	if err := k.fds.clear(); err != nil {
		k.log.Warn("systemd may still have the descriptors", "reason", err)
	}
	r.giveUp(ctx, k.log, k.store, k.dir)
	k.estate = nil
}
