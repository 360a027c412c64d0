package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
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
	mode fs.FileMode

	// mu guards the fields below and keeps lines whole.
	mu   sync.Mutex
	file *os.File
	size int64
	// stderr tells that the process's standard error goes here too.
	stderr bool
}

func openLog(path string, mode fs.FileMode) (*logFile, error) {
	l := &logFile{path: path, mode: mode}
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

// reopen goes on with the file at path, or begins one.
func (l *logFile) reopen() (err error) {
	if l.file, err = os.OpenFile(l.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, l.mode); err != nil {
		return err
	}
	st, err := l.file.Stat()
	if err != nil {
		return err
	}
	l.size = st.Size()
	if l.stderr {
		return redirectStderr(l.file)
	}
	return nil
}

// setMode has the files that are begun from now on get another mode.
func (l *logFile) setMode(mode fs.FileMode) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.mode = mode
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

// newLogger logs to the file and, if there is one, to tee, each whether or not
// the other can be written.
func newLogger(file, tee io.Writer) *slog.Logger {
	handlers := []slog.Handler{slog.NewTextHandler(file, nil)}
	if tee != nil {
		handlers = append(handlers, slog.NewTextHandler(tee, nil))
	}
	return slog.New(fanOut(handlers))
}

// A fanOut hands each record to every handler, whatever became of it at the
// others: a full disk must not silence the terminal, nor a closed terminal
// the file.
type fanOut []slog.Handler

func (f fanOut) Enabled(ctx context.Context, l slog.Level) bool {
	for _, h := range f {
		if h.Enabled(ctx, l) {
			return true
		}
	}
	return false
}

func (f fanOut) Handle(ctx context.Context, r slog.Record) error {
	var errs []error
	for _, h := range f {
		errs = append(errs, h.Handle(ctx, r.Clone()))
	}
	return errors.Join(errs...)
}

func (f fanOut) WithAttrs(attrs []slog.Attr) slog.Handler {
	with := make(fanOut, len(f))
	for i, h := range f {
		with[i] = h.WithAttrs(attrs)
	}
	return with
}

func (f fanOut) WithGroup(name string) slog.Handler {
	with := make(fanOut, len(f))
	for i, h := range f {
		with[i] = h.WithGroup(name)
	}
	return with
}

// openLog opens the log, and goes on with it where it ends.
func (h *Host) openLog(mode fs.FileMode) (err error) {
	if h.logFile, err = openLog(h.record.Log, mode); err != nil {
		return fmt.Errorf("log: %w", err)
	}
	// What is secret may not be known yet.
	h.log = newLogger(h.clean(h.logFile), h.clean(h.Tee))
	return nil
}

// clean is w without what is secret by the time that it is written.
func (h *Host) clean(w io.Writer) io.Writer {
	if w == nil {
		return nil
	}
	return writerFunc(func(p []byte) (int, error) { return h.redactor.Writer(w).Write(p) })
}

type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// logMode is that of the log. What an unprivileged list or status points to can be read too, unless
// the backend has a secret: a crash might print it past the redactor.
func (h *Host) logMode() fs.FileMode {
	if len(h.Spec.Secrets) != 0 {
		return 0o600
	}
	return 0o644
}
