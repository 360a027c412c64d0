package machine

import (
	"bufio"
	"iter"
	"os"
	"strconv"
	"strings"
)

// A Mount is one line of /proc/pid/mountinfo.
type Mount struct {
	// PID is the first process that was found to see the mount, or 0 if this one does.
	PID int
	// ID is the mount's own number.
	ID uint64
	// Number is the device number of the file system: "43:96". Some, btrfs among them, have one of
	// their own.
	Number string
	// Point is where it is mounted, as the process sees it.
	Point string
	// Type is that of the file system, such as "ext4".
	Type string
	// Source is what the mounter named as the device.
	Source string
}

// Mounts returns the mounts in the mount namespaces of all processes, those of this process first.
// What can't be read, as without privilege, is left out.
func (r Root) Mounts() iter.Seq[Mount] {
	return func(yield func(Mount) bool) {
		seen := make(map[string]bool)
		for _, pid := range append([]int{0}, r.Processes()...) {
			process := "self"
			if pid != 0 {
				process = strconv.Itoa(pid)
			}
			ns, err := os.Readlink(r.Path("proc", process, "ns/mnt"))
			if err != nil || seen[ns] {
				continue // it has exited, or there is nothing new to see
			}
			seen[ns] = true
			if !eachMount(r.Path("proc", process, "mountinfo"), pid, yield) {
				return
			}
		}
	}
}

// eachMount reads one process's mounts, and returns false when yield has had enough.
func eachMount(path string, pid int, yield func(Mount) bool) bool {
	f, err := os.Open(path)
	if err != nil {
		return true
	}
	defer f.Close() // only read
	for lines := LongLines(f); lines.Scan(); {
		if m, ok := ParseMount(lines.Text()); ok {
			m.PID = pid
			if !yield(m) {
				return false
			}
		}
	}
	return true
}

// ParseMount reads a line of mountinfo (proc_pid_mountinfo(5)): id, parent, device number, root,
// mount point, options, any number of optional fields, "-", type, source, options.
func ParseMount(line string) (Mount, bool) {
	head, tail, ok := strings.Cut(line, " - ")
	fields, rest := strings.Fields(head), strings.Fields(tail)
	if !ok || len(fields) < 6 || len(rest) < 2 {
		return Mount{}, false
	}
	id, err := strconv.ParseUint(fields[0], 10, 64)
	if err != nil {
		return Mount{}, false
	}
	return Mount{ID: id, Number: fields[2], Point: Unescape(fields[4]), Type: rest[0], Source: Unescape(rest[1])}, true
}

// Unescape undoes the kernel's way (mangle_path) to write blanks and backslashes in paths: \040.
func Unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) && isOctal(s[i+1:i+4]) && s[i+1] <= '3' {
			b.WriteByte((s[i+1]-'0')<<6 | (s[i+2]-'0')<<3 | (s[i+3] - '0'))
			i += 3
			continue
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

func isOctal(s string) bool {
	for i := range len(s) {
		if s[i] < '0' || s[i] > '7' {
			return false
		}
	}
	return true
}

// LongLines reads lines of up to a megabyte: overlay mounts list all their layers in one.
func LongLines(f *os.File) *bufio.Scanner {
	s := bufio.NewScanner(f)
	s.Buffer(nil, 1<<20)
	return s
}
