package blockdev

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	nbdmachine "github.com/nbdctl/nbdctl/nbdnl/machine"
)

// The file system on a block device is found by the kernel itself (BLKFLSBUF), but for btrfs, which
// may lie on several: only newer kernels (7.2 is one, 6.12 is not) come from the device to it. It
// is reached through its mount instead.

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
	for mount := range m.root().Mounts() {
		if mount.Type != "btrfs" {
			continue
		}
		if number, ok := m.deviceNumber(mount.Source); !ok || !numbers[number] {
			continue
		}
		ok, err := syncMount(m.reach(mount), mount.ID)
		if ok {
			return err
		}
		failed = errors.Join(failed, err)
	}
	id := filepath.Base(filepath.Dir(devices))
	return errors.Join(fmt.Errorf("the btrfs %s is not mounted where it can be synced", id), failed)
}

// reach returns the path by which a mount is reached from here, also one of another mount
// namespace.
func (m machine) reach(mount nbdmachine.Mount) string {
	process := "self"
	if mount.PID != 0 {
		process = strconv.Itoa(mount.PID)
	}
	return m.path("proc", process, "root", mount.Point)
}
