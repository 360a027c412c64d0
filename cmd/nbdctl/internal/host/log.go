package host

import (
	"errors"
	"os"
	"sync"
)

// logLimit bounds the log of one device, in bytes: the current file and the
// one before it take at most this much each.
const logLimit = 1 << 20

// A logFile is a log of bounded size. When the file is full it becomes
// path.1 and a new one is begun.
type logFile struct {
	path string

	// mu guards the fields below and keeps lines whole.
	mu   sync.Mutex
	file *os.File
	size int64
	// stderr tells that the process's standard error goes here too.
	stderr bool
}

func openLog(path string) (*logFile, error) {
	l := &logFile{path: path}
	return l, l.reopen()
}

// Write appends p, a line, to the log. It is what a slog.Handler writes to.
func (l *logFile) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.size+int64(len(p)) > logLimit {
		if err := errors.Join(os.Rename(l.path, l.path+".1"), l.file.Close(), l.reopen()); err != nil {
			return 0, err
		}
	}
	n, err := l.file.Write(p)
	l.size += int64(n)
	return n, err
}

// reopen begins a new file at path.
func (l *logFile) reopen() (err error) {
	// 0644: what an unprivileged list or status points to can be read too.
	l.file, err = os.OpenFile(l.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	l.size = 0
	if err == nil && l.stderr {
		err = redirectStderr(l.file)
	}
	return err
}

// captureStderr sends what the process writes to its standard error, a crash
// of the runtime for one, to the log.
func (l *logFile) captureStderr() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stderr = true
	return redirectStderr(l.file)
}

func (l *logFile) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.file.Close()
}
