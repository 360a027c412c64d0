package host

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
)

// living begins to watch the process of e; nil if it has ended or can't be
// reached.
//
// While its lock is held, the number is still that of the process that serves. In
// another pid namespace it means another process, which is a stranger. So the
// process must have the lock's file open.
func (e *Entry) living() (*process, error) {
	if e.Ended() {
		return nil, nil
	}
	p, err := watchProcess(e.PID)
	if err != nil {
		if _, gone := os.Stat(fmt.Sprintf("/proc/%d", e.PID)); gone != nil {
			err = nil
		}
		return nil, err
	}
	if e.Ended() || !opened(e.PID, filepath.Join(e.dir, "lock")) {
		p.close()
		return nil, nil
	}
	return p, nil
}

// signalServing sends a signal to the process pid if it is the one that serves the device with that
// directory, and not one that has got its number.
func signalServing(pid int, dir string, s os.Signal) error {
	p, err := os.FindProcess(pid) // It is this one from here on.
	if err != nil {
		return err
	}
	defer p.Release()
	if !opened(pid, filepath.Join(dir, "lock")) {
		return os.ErrProcessDone
	}
	return p.Signal(s)
}

// opened tells whether the process pid has the file at path open.
func opened(pid int, path string) bool {
	want, err := os.Stat(path)
	if err != nil {
		return false
	}
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	fds, err := os.ReadDir(dir)
	return err == nil && slices.ContainsFunc(fds, func(f os.DirEntry) bool {
		have, err := os.Stat(filepath.Join(dir, f.Name()))
		return err == nil && os.SameFile(want, have)
	})
}
