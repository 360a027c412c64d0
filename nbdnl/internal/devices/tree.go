// Package devices reads what the kernel shows of nbd devices below /sys/block.
package devices

import (
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/nbdctl/nbdctl/nbdnl/internal/names"
	"github.com/nbdctl/nbdctl/nbdnl/machine"
)

// sectorSize is the unit of /sys/block/*/size on every device.
const sectorSize = 512

// A Use is one use of an index: what sysfs shows between a connect and the end of that device.
type Use struct {
	// Connected is whether there is a `pid` file, which nbd_start_device makes and nbd_config_put
	// removes.
	Connected bool
	// Incarnation is that of the `pid` file.
	Incarnation machine.Incarnation
	// TID is the thread that connected the device; 0 when it can't be read.
	TID int
	// Identified is whether the kernel shows an identifier, empty or not: a netlink device from
	// Linux 5.14 on.
	Identified bool
	Identifier string
}

// A Tree is /sys/block of a machine.
type Tree struct {
	root machine.Root
	// readTID is whether the `pid` file may be read. Linux 5.10 follows a pointer to the thread
	// that may have exited (pid_show uses task_recv); 6.1 keeps the number.
	readTID bool
	// Identifiers is whether this kernel keeps identifiers.
	Identifiers bool
}

// New returns the tree of a machine.
func New(root machine.Root) Tree {
	r := root.Release()
	return Tree{root: root, readTID: !r.Before(6, 1, 0), Identifiers: !r.Before(5, 14, 0)}
}

// Dir returns the device's directory.
func (t Tree) Dir(index int) string { return t.root.Path("sys/block", names.Device(index)) }

// Incarnation returns that of the present use of an index, or 0 if the device is not connected, or
// can't be seen. It does not block.
func (t Tree) Incarnation(index int) machine.Incarnation {
	now, _ := machine.IncarnationOf(t.ownerPath(index))
	return now
}

// Keeper returns the process whose open descriptor keeps the device connected (NBD_DO_IT), as far
// as that can be told, or 0.
func (t Tree) Keeper(index int) int {
	u, err := t.Use(index)
	if err != nil || !u.Connected || u.Identified || !t.Identifiers {
		return 0
	}
	pid, _ := t.root.ProcessOf(u.TID)
	return pid
}

// Indexes returns the indexes of all devices, ascending.
func (t Tree) Indexes() ([]int, error) {
	dir, err := os.Open(t.root.Path("sys/block"))
	if err != nil {
		return nil, err
	}
	entries, err := dir.Readdirnames(-1)
	if err := errors.Join(err, dir.Close()); err != nil {
		return nil, err
	}
	var indexes []int
	for _, n := range entries {
		if i, ok := names.Index(n); ok {
			indexes = append(indexes, i)
		}
	}
	slices.Sort(indexes)
	return indexes, nil
}

// Visible returns an error when sysfs is not mounted. Where there are hundreds of devices, to list
// them would take longer than to connect one.
func (t Tree) Visible() error {
	_, err := os.Stat(t.root.Path("sys/block"))
	return err
}

// Exists returns an error that matches os.ErrNotExist when there is no such device.
func (t Tree) Exists(index int) error {
	_, err := os.Stat(t.Dir(index))
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("there is no such device: %w", os.ErrNotExist)
	}
	return err
}

// Use reads which use of the index this is.
func (t Tree) Use(index int) (Use, error) {
	for {
		u, err := t.owner(index)
		if err != nil || !u.Connected {
			return u, errors.Join(err, t.Exists(index))
		}
		// nbd_genl_connect makes `backend` before `pid`, and nbd_config_put removes it after `pid`:
		// while that is the same file, so is the identifier.
		u.Identifier, u.Identified, err = t.Attribute(index, "backend")
		if err != nil {
			return Use{}, err
		}
		now, err := machine.IncarnationOf(t.ownerPath(index))
		if now == u.Incarnation && err == nil {
			return u, nil
		}
		if err != nil && !gone(err) {
			return Use{}, err
		}
	}
}

func (t Tree) ownerPath(index int) string { return filepath.Join(t.Dir(index), "pid") }

// owner reads no more than the `pid` file.
func (t Tree) owner(index int) (Use, error) {
	now, pid, err := machine.ReadIncarnation(t.ownerPath(index), t.readTID)
	if gone(err) {
		return Use{}, nil
	}
	if err != nil {
		return Use{}, err
	}
	u := Use{Connected: true, Incarnation: now}
	if !t.readTID {
		return u, nil
	}
	if u.TID, err = strconv.Atoi(strings.TrimSpace(string(pid))); err != nil {
		return Use{}, fmt.Errorf("%s: pid: %w", names.Device(index), err)
	}
	return u, nil
}

// gone reports whether err says that the attribute does not exist, or was removed while it was
// open.
func gone(err error) bool { return errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ENODEV) }

// Attribute reads a file of the device's directory; ok is false when there is none, or no device.
func (t Tree) Attribute(index int, file string) (value string, ok bool, err error) {
	b, err := machine.ReadAttribute(filepath.Join(t.Dir(index), file))
	if gone(err) {
		return "", false, nil
	}
	if err != nil {
		return "", false, err
	}
	return strings.TrimSuffix(string(b), "\n"), true, nil
}

// Number reads a file that holds a decimal number; a missing one counts as 0.
func (t Tree) Number(index int, file string) (uint64, error) {
	value, ok, err := t.Attribute(index, file)
	if err != nil || !ok {
		return 0, err
	}
	n, err := strconv.ParseUint(value, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%s: %s %q is not a number", names.Device(index), file, value)
	}
	return n, nil
}

// Size returns the device's size in bytes.
func (t Tree) Size(index int) (int64, error) {
	sectors, err := t.Number(index, "size")
	// Linux 5.10 takes any size, a negative one too.
	return int64(min(sectors, math.MaxInt64/sectorSize)) * sectorSize, err
}

// Partitions returns the names of the device's partitions, ascending.
func (t Tree) Partitions(index int) ([]string, error) {
	paths, err := filepath.Glob(filepath.Join(t.Dir(index), names.Device(index)+"p*"))
	if err != nil {
		return nil, err
	}
	partitions := make([]string, len(paths))
	for i, p := range paths {
		partitions[i] = filepath.Base(p)
	}
	return partitions, nil
}
