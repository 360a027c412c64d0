package machine

import (
	"bufio"
	"errors"
	"os"
	"slices"
	"strconv"
	"strings"
)

// Processes returns the numbers of all processes that can be seen, ascending.
func (r Root) Processes() []int {
	dir, err := os.Open(r.Path("proc"))
	if err != nil {
		return nil
	}
	defer dir.Close()                // only read
	names, _ := dir.Readdirnames(-1) // those that it returns with an error do
	var pids []int
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err == nil && pid > 0 {
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)
	return pids
}

// initialPIDNamespace is the initial pid namespace's inode number: PROC_PID_INIT_INO in
// linux/proc_ns.h.
const initialPIDNamespace = "pid:[4026531836]"

// InitialPIDs reports whether the kernel's numbers of threads mean the same here: those are of the
// initial pid namespace, and mean other threads in any other.
func (r Root) InitialPIDs() bool {
	ns, err := os.Readlink(r.Path("proc/self/ns/pid"))
	return err == nil && ns == initialPIDNamespace
}

// ProcessOf returns the process that a thread belongs to, or 0, and whether the thread is known to
// have ended. The thread's number is one of the initial pid namespace.
func (r Root) ProcessOf(tid int) (pid int, gone bool) {
	if tid <= 0 || !r.InitialPIDs() {
		return 0, false
	}
	f, err := os.Open(r.Path("proc", strconv.Itoa(tid), "status"))
	if err != nil {
		return 0, errors.Is(err, os.ErrNotExist)
	}
	defer f.Close() // only read
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if v, ok := strings.CutPrefix(lines.Text(), "Tgid:"); ok {
			pid, _ := strconv.Atoi(strings.TrimSpace(v)) // 0 is "unknown"
			return pid, false
		}
	}
	return 0, false
}
