//go:build survive

package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A crashLoad writes files to a file system, one after the other, of which every fourth is synced.
// It goes on after errors.
type crashLoad struct {
	mnt  string
	stop chan struct{}
	done chan struct{} // is closed when it has ended

	mu     sync.Mutex // guards the following
	files  []crashFile
	failed int
	first  error     // that it met
	begun  time.Time // when an event began
	ended  time.Time // and when it ended
	goesOn bool      // a file was synced that was begun when the event had ended

	longest time.Duration // that a file took since the event began
}

// A crashFile was written without an error.
type crashFile struct {
	number int
	synced bool
}

const crashFileSize = 16 << 10

func newCrashLoad(mnt string) *crashLoad {
	l := &crashLoad{mnt: mnt, stop: make(chan struct{}), done: make(chan struct{})}
	go l.run()
	return l
}

func (l *crashLoad) run() {
	defer close(l.done)
	pause := time.NewTicker(10 * time.Millisecond)
	defer pause.Stop()
	for number := 0; ; number++ {
		select {
		case <-l.stop:
			return
		case <-pause.C:
		}
		begun, synced := time.Now(), number%4 == 3
		err := l.write(number, synced)
		l.mu.Lock()
		switch {
		case err != nil:
			l.failed++
			if l.first == nil {
				l.first = err
			}
		default:
			l.files = append(l.files, crashFile{number, synced})
			l.goesOn = l.goesOn || synced && !l.ended.IsZero() && begun.After(l.ended)
			if !l.begun.IsZero() {
				l.longest = max(l.longest, time.Since(begun))
			}
		}
		l.mu.Unlock()
	}
}

func (l *crashLoad) write(number int, synced bool) error {
	f, err := os.Create(filepath.Join(l.mnt, fmt.Sprint(number)))
	if err != nil {
		return err
	}
	_, err = f.Write(cutContent(number, crashFileSize))
	if synced {
		err = errors.Join(err, f.Sync())
	}
	return errors.Join(err, f.Close())
}

// event notes that something begins to happen.
func (l *crashLoad) event() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.begun = time.Now()
}

// after notes that it has happened.
func (l *crashLoad) after() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ended = time.Now()
}

// going tells whether the load went on after the event.
func (l *crashLoad) going() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.goesOn
}

// errors says what the load has met.
func (l *crashLoad) errors() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var errno unix.Errno
	if l.failed == 0 {
		return "no error"
	}
	errors.As(l.first, &errno)
	return fmt.Sprintf("%d errors, first: %v", l.failed, errno)
}

// lost returns of how many bytes a file system has not what was written, or what was synced.
func (l *crashLoad) lost(mnt string) (written, synced int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, f := range l.files {
		// What cannot be read is lost.
		content, _ := os.ReadFile(filepath.Join(mnt, fmt.Sprint(f.number)))
		if bytes.Equal(content, cutContent(f.number, crashFileSize)) {
			continue
		}
		if f.synced {
			synced += crashFileSize
		} else {
			written += crashFileSize
		}
	}
	return written, synced
}

// firstRead returns how long it takes until something is read from a device; 0: longer than that.
func firstRead(dev string, patience time.Duration) time.Duration {
	begun := time.Now()
	read := make(chan time.Duration, 1)
	go func() {
		for time.Since(begun) < patience {
			if readDirect(dev) == nil {
				read <- time.Since(begun)
				return
			}
			<-time.After(20 * time.Millisecond)
		}
	}()
	select {
	case d := <-read:
		return d
	case <-time.After(patience):
		return 0
	}
}

func readDirect(dev string) error {
	fd, err := unix.Open(dev, unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	buf, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	defer unix.Munmap(buf)
	n, err := unix.Pread(fd, buf, 0)
	if err == nil && n != len(buf) {
		return unix.EIO
	}
	return err
}

// awaitEnd waits until the load has ended, but not for long.
func (l *crashLoad) awaitEnd(t *testing.T, patience time.Duration) bool {
	t.Helper()
	select {
	case <-l.done:
		return true
	case <-time.After(patience):
		return false
	}
}
