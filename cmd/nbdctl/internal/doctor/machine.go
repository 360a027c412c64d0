package doctor

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/machine"
)

// A Machine is what is examined. Its zero value is the running one. Checks
// leave in it what later ones need to know.
type Machine struct {
	// System is where the devices are; its Root holds all files that are read.
	System nbdnl.System
	// LoadModule loads the nbd module; nil: nobody can.
	LoadModule func() error

	// silent is why the kernel can't be controlled; nil if it can.
	silent error
	// byIoctl is that it is controlled by ioctls, for want of netlink.
	byIoctl bool
	// nodeless is that devices have no nodes in /dev.
	nodeless bool
	// newState is the state directory if it is not there.
	newState string
	// bench is where devices are made; nil before the first.
	bench *bench
	// trial is how the first device fared, nil before.
	trial *trial
}

// root is where the machine's files are.
func (m *Machine) root() machine.Root { return machine.Root(m.System.Root) }

// path returns the path of a file, given from the root directory on.
func (m *Machine) path(elem ...string) string { return m.root().Path(elem...) }

// read returns the content of a file without the newline at its end, and "" if
// there is none.
func (m *Machine) read(elem ...string) string {
	b, err := os.ReadFile(m.path(elem...))
	if err != nil {
		return ""
	}
	return strings.TrimSuffix(string(b), "\n")
}

// exists tells whether there is such a file.
func (m *Machine) exists(elem ...string) bool {
	_, err := os.Lstat(m.path(elem...))
	return err == nil
}

// release returns the kernel's version.
func (m *Machine) release() machine.Release { return m.root().Release() }

// loaded tells whether the kernel has the driver at this moment.
func (m *Machine) loaded() bool { return m.exists("sys/module/nbd") }

// modular tells whether the driver that the kernel has is a module, not built in.
func (m *Machine) modular() bool { return m.exists("sys/module/nbd/initstate") }

// devices returns the names of all devices of the driver, by ascending index.
func (m *Machine) devices() []string {
	entries, err := os.ReadDir(m.path("sys/block"))
	if err != nil {
		return nil
	}
	var indexes []int
	for _, e := range entries {
		if digits, isNBD := strings.CutPrefix(e.Name(), "nbd"); isNBD {
			if i, err := strconv.Atoi(digits); err == nil {
				indexes = append(indexes, i)
			}
		}
	}
	slices.Sort(indexes)
	names := make([]string, len(indexes))
	for i, index := range indexes {
		names[i] = "nbd" + strconv.Itoa(index)
	}
	return names
}

// The capabilities that matter, by their numbers in linux/capability.h.
const (
	capNetAdmin  = 12
	capSysModule = 16
	capSysAdmin  = 21
)

// capable tells whether this process has a capability, in whatever user namespace.
func (m *Machine) capable(capability int) bool {
	for line := range strings.Lines(m.read("proc/self/status")) {
		if set, found := strings.CutPrefix(line, "CapEff:"); found {
			caps, err := strconv.ParseUint(strings.TrimSpace(set), 16, 64)
			return err == nil && caps&(1<<capability) != 0
		}
	}
	return false
}

// The initial namespaces, by the numbers of their inodes: PROC_USER_INIT_INO
// and PROC_PID_INIT_INO in linux/proc_ns.h.
const (
	initialUser = "user:[4026531837]"
	initialPID  = "pid:[4026531836]"
)

// namespace returns the namespace of that kind which a process is in, "" if
// that can't be seen.
func (m *Machine) namespace(process, kind string) string {
	ns, _ := os.Readlink(m.path("proc", process, "ns", kind)) // what can't be read is not known
	return ns
}

// inOtherUserNamespace tells whether this process is known to be in another
// user namespace than the first one, where its capabilities count for nothing.
func (m *Machine) inOtherUserNamespace() bool {
	ns := m.namespace("self", "user")
	return ns != "" && ns != initialUser
}

// privileged tells whether the kernel lets this process change devices.
func (m *Machine) privileged() bool { return m.capable(capSysAdmin) && !m.inOtherUserNamespace() }

// network tells whether this process is in the first network namespace, as far
// as can be seen.
func (m *Machine) network() (first, known bool) {
	// In another pid namespace process 1 is not the machine's.
	if m.namespace("self", "pid") != initialPID {
		return false, false
	}
	mine, theirs := m.namespace("self", "net"), m.namespace("1", "net")
	return mine == theirs, mine != "" && theirs != ""
}

// configFiles returns the files with that ending that configure something, in
// the order in which they are read: a file in an earlier directory hides one of
// the same name in a later one.
func (m *Machine) configFiles(ending string, directories ...string) []string {
	files := make(map[string]string)
	for _, dir := range directories {
		entries, err := os.ReadDir(m.path(dir))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			continue // and what can't be read can't be judged
		}
		for _, e := range entries {
			if _, hidden := files[e.Name()]; !hidden && strings.HasSuffix(e.Name(), ending) {
				files[e.Name()] = "/" + filepath.Join(dir, e.Name())
			}
		}
	}
	names := make([]string, 0, len(files))
	for name := range files {
		names = append(names, name)
	}
	slices.Sort(names)
	for i, name := range names {
		names[i] = files[name]
	}
	return names
}

// configLines returns the lines of a file, those that end with a backslash
// joined with the next, without comments.
func (m *Machine) configLines(file string) []string {
	var lines []string
	for line := range strings.Lines(strings.ReplaceAll(m.read(file), "\\\n", " ")) {
		if line = strings.TrimSpace(line); line != "" && line[0] != '#' {
			lines = append(lines, line)
		}
	}
	return lines
}
