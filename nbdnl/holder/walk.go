package holder

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/nbdctl/nbdctl/nbdnl/internal/devices"
	"github.com/nbdctl/nbdctl/nbdnl/internal/names"
	"github.com/nbdctl/nbdctl/nbdnl/machine"
)

// A walk goes once through all that shows who uses some devices.
type walk struct {
	finder *Finder
	done   chan struct{} // closed at the end of a walk that is shared
	disks  map[int]*disk // by index
	// parts are the devices and their partitions, by number: "43:96" is nbd3.
	parts map[string]part
}

// A disk is what a walk knows of one device.
type disk struct {
	err    error // why it can't be looked at
	traces []trace
	keeper Descriptor // by which NBD_DO_IT keeps it connected
}

// A part is a device or a partition of it.
type part struct {
	disk *disk
	name string // "nbd3", or "nbd3p1" for a partition
}

// A trace is what shows of a holder in one place. There may be several of one holder.
type trace struct {
	holder Holder
	fd     int // of a process
}

func (f *Finder) newWalk() *walk {
	return &walk{finder: f, done: make(chan struct{}), disks: make(map[int]*disk), parts: make(map[string]part)}
}

// add has the walk, which must not have begun, look for the holders of these devices too.
func (w *walk) add(indexes ...int) {
	for _, index := range indexes {
		w.disks[index] = &disk{}
	}
}

// run takes the walk.
func (w *walk) run() {
	for index, d := range w.disks {
		d.err = w.find(index, d)
	}
	if len(w.parts) == 0 {
		return // nobody holds what is not there
	}
	w.loops()
	w.mounts()
	w.swaps()
	w.processes()
}

// find learns the numbers of a device and its partitions, and what the kernel has linked to them.
func (w *walk) find(index int, d *disk) error {
	tree := devices.New(w.finder.Root)
	d.keeper = Descriptor{tree.Keeper(index), AnyFD}
	dir := tree.Dir(index)
	partitions, err := filepath.Glob(filepath.Join(dir, names.Device(index)+"p*"))
	if err != nil {
		return err
	}
	for _, dir := range append([]string{dir}, partitions...) {
		p := part{d, filepath.Base(dir)}
		number, err := os.ReadFile(filepath.Join(dir, "dev"))
		if errors.Is(err, os.ErrNotExist) && p.name != names.Device(index) {
			continue // the partition was removed meanwhile
		}
		if err != nil {
			return fmt.Errorf("there is no such device: %w", err)
		}
		w.parts[strings.TrimSpace(string(number))] = p
		w.stacked(dir, p)
	}
	return nil
}

// note notes a holder of a device or partition.
func (p part) note(h Holder, fd int) {
	h.Device = p.name
	p.disk.traces = append(p.disk.traces, trace{h, fd})
}

// stacked finds the devices that the kernel links to the device or partition with that directory in
// sysfs: device mapper, md and their like.
func (w *walk) stacked(dir string, p part) {
	for _, above := range list(filepath.Join(dir, "holders")) {
		h := Holder{Kind: Device, Path: above}
		if b, err := os.ReadFile(w.finder.Root.Path("sys/block", above, "dm/name")); err == nil {
			h.Path = strings.TrimSpace(string(b))
		}
		p.note(h, 0)
	}
}

// loops finds loop devices, which the kernel does not link to what they are made of.
func (w *walk) loops() {
	files, err := filepath.Glob(w.finder.Root.Path("sys/block/loop*/loop/backing_file"))
	if err != nil {
		return
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		if p, ok := w.part(strings.TrimSuffix(string(b), "\n")); ok {
			loop := filepath.Base(filepath.Dir(filepath.Dir(f)))
			p.note(Holder{Kind: Device, Path: loop}, 0)
		}
	}
}

// mounts finds mounts in the mount namespaces of all processes.
func (w *walk) mounts() {
	for m := range w.finder.Root.Mounts() {
		w.mount(m)
	}
}

// mount notes the mount if it is one of the devices.
func (w *walk) mount(m machine.Mount) {
	p, ok := w.parts[m.Number]
	if !ok && strings.HasPrefix(m.Source, "/dev/") {
		// btrfs and its like show a number of their own.
		p, ok = w.part(m.Source)
	}
	if !ok {
		return
	}
	already := func(t trace) bool {
		return t.holder.Kind == Mount && t.holder.Path == m.Point && t.holder.Device == p.name
	}
	if slices.ContainsFunc(p.disk.traces, already) {
		return
	}
	h := Holder{Kind: Mount, Path: m.Point, PID: m.PID}
	if m.PID != 0 {
		h.Comm = w.comm(m.PID)
	}
	p.note(h, 0)
}

// swaps finds swap space.
func (w *walk) swaps() {
	f, err := os.Open(w.finder.Root.Path("proc/swaps"))
	if err != nil {
		return
	}
	defer f.Close()
	for lines := machine.LongLines(f); lines.Scan(); {
		path, _, _ := strings.Cut(lines.Text(), " ")
		path, _, _ = strings.Cut(path, "\t")
		if p, ok := w.part(machine.Unescape(path)); ok {
			p.note(Holder{Kind: Swap, Path: machine.Unescape(path)}, 0)
		}
	}
}

// processes finds processes that have a device open.
func (w *walk) processes() {
	for _, pid := range w.finder.Root.Processes() {
		w.descriptors(pid)
	}
}

// descriptors finds those of a process. There may be tens of thousands on a machine, so that each
// is looked at by one system call, and no other if it is none of a block device.
func (w *walk) descriptors(pid int) {
	process := w.finder.Root.Path("proc", strconv.Itoa(pid))
	dir, err := os.Open(filepath.Join(process, "fd"))
	if err != nil {
		return // it has exited, or may not be looked at
	}
	defer dir.Close()
	names, _ := dir.Readdirnames(-1) // those that it returns with an error do
	for _, fd := range names {
		number, ok := w.finder.deviceNumberIn(dir, fd)
		if !ok {
			continue
		}
		p, ours := w.parts[number]
		n, err := strconv.Atoi(fd)
		if !ours || err != nil || isPathOnly(process, fd) {
			continue
		}
		path, err := os.Readlink(filepath.Join(dir.Name(), fd))
		if err != nil {
			continue // closed
		}
		p.note(Holder{Kind: Process, Path: path, PID: pid, Comm: w.comm(pid)}, n)
	}
}

// isPathOnly reports whether a descriptor was opened with O_PATH, which does not open the device.
func isPathOnly(process, fd string) bool {
	const oPath = 0o10000000 // O_PATH, asm-generic/fcntl.h
	b, err := os.ReadFile(filepath.Join(process, "fdinfo", fd))
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(b), "flags:")
	line, _, _ := strings.Cut(rest, "\n")
	flags, err := strconv.ParseUint(strings.TrimSpace(line), 8, 64)
	return err == nil && flags&oPath != 0
}

// part returns the device or partition, if it is one of those looked for, that a path of the system
// leads to.
func (w *walk) part(path string) (part, bool) {
	number, ok := w.finder.deviceNumber(w.finder.Root.Path(path))
	if !ok {
		return part{}, false
	}
	p, ok := w.parts[number]
	return p, ok
}

// comm returns the name of a process.
func (w *walk) comm(pid int) string {
	comm, err := os.ReadFile(w.finder.Root.Path("proc", strconv.Itoa(pid), "comm"))
	if err != nil {
		return "?" // it has exited
	}
	return strings.TrimSuffix(string(comm), "\n")
}

// list returns the names in a directory, none if it can't be read.
func list(dir string) []string {
	f, err := os.Open(dir)
	if err != nil {
		return nil
	}
	defer f.Close()
	names, _ := f.Readdirnames(-1) // those that it returns with an error do
	return names
}
