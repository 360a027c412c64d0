package host

import (
	"math"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// undoTimeout bounds the wait for a process that was asked to undo its start,
// which itself gives up after half a minute.
const undoTimeout = 45 * time.Second

// filesVariable lists the names of the inherited files, from descriptor 3 on. A number
// that is not in use has an empty name.
const filesVariable = "NBDCTL_FILES"

// firstFile is the descriptor of the first of them (exec.Cmd.ExtraFiles).
const firstFile = 3

// A legacy is what a serving process inherits. After an error it takes nothing more.
type legacy struct {
	names []string
	files []*os.File
	ends  []*os.File // the other ends of its pipes
	err   error
}

// reads has the process read a pipe of that name, and returns where to write.
func (l *legacy) reads(name string) *os.File {
	r, w := l.pipe()
	l.add(name, r)
	l.ends = append(l.ends, w)
	return w
}

// writes has the process write a pipe of that name, and returns where to read.
func (l *legacy) writes(name string) *os.File {
	r, w := l.pipe()
	l.add(name, w)
	l.ends = append(l.ends, r)
	return r
}

func (l *legacy) pipe() (r, w *os.File) {
	if l.err == nil {
		r, w, l.err = os.Pipe()
	}
	return r, w
}

// add has the process inherit a file, which is used up.
func (l *legacy) add(name string, f *os.File) {
	l.names, l.files = append(l.names, name), append(l.files, f)
}

// start starts the serving process. image is the descriptor that keeps its number; a negative one
// is none. After an error all is closed.
func (l *legacy) start(image int) (*exec.Cmd, error) {
	// By this link it is the very program that runs now, even if another has
	// been installed at its path meanwhile.
	cmd := exec.Command("/proc/self/exe", Command)
	cmd.Args[0] = "nbdctl"
	cmd.Dir = "/" // not to keep the user's directory from being unmounted
	var names []string
	names, cmd.ExtraFiles = layout(l.names, l.files, image)
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
	err := l.err
	if err == nil {
		err = closeOnExec()
	}
	if err == nil {
		err = cmd.Start()
	}
	for _, theirs := range cmd.ExtraFiles {
		closeFile(theirs) // They have copies.
	}
	if err != nil {
		for _, end := range l.ends {
			closeFile(end)
		}
		return nil, err
	}
	return cmd, nil
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
