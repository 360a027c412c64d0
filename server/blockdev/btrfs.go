package blockdev

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// The file system on a block device is found by the kernel itself (BLKFLSBUF), but for btrfs, which may lie on several: only newer
// kernels (7.2 is one, 6.12 is not) come from the device to it. It is reached through its mount instead.

// syncBtrfs writes what those btrfs have not written yet that use one of the layers.
func (m machine) syncBtrfs(layers []layer) error {
	used := make(map[string]bool)
	for _, l := range layers {
		used[l.name] = true
	}
	members, err := filepath.Glob(m.path("sys/fs/btrfs/*/devices/*"))
	if err != nil {
		return err
	}
	var failed error
	seen := make(map[string]bool)
	for _, member := range members {
		dir := filepath.Dir(filepath.Dir(member))
		if !used[filepath.Base(member)] || seen[dir] {
			continue
		}
		seen[dir] = true
		err := m.syncMounted(filepath.Join(dir, "devices"))
		if _, gone := os.Lstat(member); gone == nil { // Else it was unmounted meanwhile, which has written all.
			failed = errors.Join(failed, err)
		}
	}
	return failed
}

// syncMounted syncs the file system whose devices are in a directory of sysfs.
func (m machine) syncMounted(devices string) error {
	files, err := filepath.Glob(filepath.Join(devices, "*", "dev"))
	if err != nil {
		return err
	}
	numbers := make(map[string]bool)
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil {
			numbers[strings.TrimSpace(string(b))] = true
		}
	}
	var failed error
	for _, mt := range m.mounts("btrfs") {
		if number, ok := m.deviceNumber(mt.source); !ok || !numbers[number] {
			continue
		}
		ok, err := syncMount(mt.path, mt.id)
		if ok {
			return err
		}
		failed = errors.Join(failed, err)
	}
	return errors.Join(fmt.Errorf("the btrfs %s is not mounted where it can be synced", filepath.Base(filepath.Dir(devices))), failed)
}

// A mount is one of a block device.
type mount struct {
	id     uint64
	path   string // by which it is reached from here
	source string // what the mounter named as the device
}

// mounts returns the mounts of a type of file system that the mount namespaces of all processes have.
func (m machine) mounts(fileSystem string) (mounts []mount) {
	processes, err := filepath.Glob(m.path("proc/[0-9]*"))
	if err != nil {
		return nil
	}
	seen := make(map[string]bool)
	for _, p := range append([]string{m.path("proc/self")}, processes...) {
		ns, err := os.Readlink(filepath.Join(p, "ns/mnt"))
		if err != nil || seen[ns] {
			continue // It has exited, or there is nothing new to see.
		}
		seen[ns] = true
		f, err := os.Open(filepath.Join(p, "mountinfo"))
		if err != nil {
			continue
		}
		lines := bufio.NewScanner(f)
		lines.Buffer(nil, 1<<20) // Overlay mounts list all their layers in one.
		for lines.Scan() {
			if mt, ok := parseMount(lines.Text(), fileSystem); ok {
				mt.path = filepath.Join(p, "root", mt.path)
				mounts = append(mounts, mt)
			}
		}
		_ = f.Close() // It was only read.
	}
	return mounts
}

// parseMount reads a line of /proc/pid/mountinfo (proc_pid_mountinfo(5)): the number of the mount, of its parent, of the device, what
// of the file system is mounted, where, its options, any number of tags, "-", the type, the source.
func parseMount(line, fileSystem string) (mount, bool) {
	head, tail, _ := strings.Cut(line, " - ")
	here, what := strings.Fields(head), strings.Fields(tail)
	if len(here) < 5 || len(what) < 2 || what[0] != fileSystem {
		return mount{}, false
	}
	id, err := strconv.ParseUint(here[0], 10, 64)
	return mount{id: id, path: unmangle.Replace(here[4]), source: unmangle.Replace(what[1])}, err == nil
}

// unmangle undoes what the kernel does to paths there (mangle_path).
var unmangle = strings.NewReplacer(`\011`, "\t", `\012`, "\n", `\040`, " ", `\043`, "#", `\134`, `\`)
