package host

import (
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// undoTimeout bounds the wait for a process that was asked to undo its start,
// which itself gives up after half a minute.
const undoTimeout = 45 * time.Second

// firstFile is the descriptor of the first of them (exec.Cmd.ExtraFiles).
const firstFile = 3

// A legacy is what a serving process inherits. After an error it takes nothing more.
type legacy struct {
	names []string
	files []*os.File
	ends  []*os.File // the other ends of its pipes
	apart bool       // it is to be in a unit of its own, where there is systemd
	env   []string   // its environment; nil: that of this process
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
	names, files := layout(l.names, l.files, image)
	// What the caller has open, a lock or the pipe of a test runner, must not
	// stay open for as long as the device is connected.
	err := l.err
	if err == nil {
		err = closeOnExec()
	}
	var cmd *exec.Cmd
	if err == nil {
		cmd, err = l.execute(names, files, image)
	}
	for _, theirs := range files {
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

// execute starts it, in a unit of its own if it is to be in one and there is systemd.
func (l *legacy) execute(names []string, files []*os.File, image int) (*exec.Cmd, error) {
	if run := systemdRun(); l.apart && run != "" {
		cmd, err := l.executeApart(run, names, files, image)
		if err == nil {
			return cmd, nil
		}
		fmt.Fprintln(os.Stderr, "nbdctl: the process is not in a unit of its own, and may end with this login:", err)
	}
	// By this link it is the very program that runs now, even if another has
	// been installed at its path meanwhile.
	cmd := l.command([]string{"/proc/self/exe"}, names, files, image)
	cmd.Args[0] = "nbdctl"
	return cmd, cmd.Start()
}

// executeApart starts it by systemd, and waits until it runs.
func (l *legacy) executeApart(run string, names []string, files []*os.File, image int) (*exec.Cmd, error) {
	program, err := ownProgram()
	if err != nil {
		return nil, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	names = append(slices.Clone(names), fileBegan)
	files = append(slices.Clone(files), w)
	cmd := l.command(append(scope(run), program), names, files, image)
	err = errors.Join(cmd.Start(), w.Close())
	if err != nil {
		return nil, err
	}
	if err = r.SetReadDeadline(time.Now().Add(unitPatience)); err == nil {
		_, err = r.Read(make([]byte, 1))
	}
	if err != nil {
		_ = cmd.Process.Kill()
		return nil, fmt.Errorf("systemd-run: %w, %v", err, cmd.Wait())
	}
	return cmd, nil
}

// ownProgram is the path of the program that runs now, or, where another has been installed at its
// path meanwhile, a link to it that is good for as long as this process lives.
func ownProgram() (string, error) {
	path, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return "", err
	}
	ours, err1 := os.Stat("/proc/self/exe")
	there, err2 := os.Stat(path)
	if err1 != nil || err2 != nil || !os.SameFile(ours, there) {
		path = fmt.Sprintf("/proc/%d/exe", os.Getpid())
	}
	return path, nil
}

// command is the serving process, started by these words.
func (l *legacy) command(words, names []string, files []*os.File, image int) *exec.Cmd {
	cmd := exec.Command(words[0], append(slices.Clone(words[1:]), Command)...)
	cmd.Dir = "/" // not to keep the user's directory from being unmounted
	cmd.ExtraFiles = files
	if image == 0 {
		cmd.Stdin = os.Stdin
	}
	cmd.Env = l.env
	if cmd.Env == nil {
		cmd.Env = os.Environ()
	}
	cmd.Env = append(slices.Clone(cmd.Env), filesVariable+"="+strings.Join(names, ":"))
	// Until it has its log, it complains where we do.
	cmd.Stderr = os.Stderr
	// A session of its own: the terminal's Ctrl-C and hang-up are not for it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	return cmd
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
