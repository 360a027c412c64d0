package nbdnl

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
)

// A life tells one use of an index from the next: what sysfs shows between a connect and the end of
// that device.
type life struct {
	// connected is whether there is a `pid` file, which nbd_start_device makes and nbd_config_put
	// removes.
	connected bool
	// birth is the inode of the `pid` file. kernfs numbers its files in turn, so that a file which was
	// made anew has another one.
	birth uint64
	// tid is the thread that connected the device; 0 when it can't be read.
	tid int
	// identified is whether the kernel shows an identifier, empty or not: a netlink device from
	// Linux 5.14 on.
	identified bool
	identifier string
}

// A sysfs reads what the kernel shows of devices under /sys/block.
type sysfs struct {
	sys *System
	// readTID is whether the `pid` file may be read. Linux 5.10 follows a pointer to the thread that
	// may have exited (pid_show uses task_recv); 6.1 keeps the number.
	readTID bool
	// identifiers is whether this kernel keeps identifiers.
	identifiers bool
}

func newSysfs(s *System) sysfs {
	major, minor := s.release()
	return sysfs{
		sys:         s,
		readTID:     major > 6 || major == 6 && minor >= 1,
		identifiers: major > 5 || major == 5 && minor >= 14,
	}
}

// indexes returns the indexes of all devices, ascending.
func (s sysfs) indexes() ([]int, error) {
	dir, err := os.Open(s.sys.path("sys/block"))
	if err != nil {
		return nil, err
	}
	names, err := dir.Readdirnames(-1)
	if err := errors.Join(err, dir.Close()); err != nil {
		return nil, err
	}
	var indexes []int
	for _, n := range names {
		if i, ok := deviceIndex(n); ok {
			indexes = append(indexes, i)
		}
	}
	slices.Sort(indexes)
	return indexes, nil
}

// visible returns an error when sysfs is not mounted. Where there are hundreds of devices, to list them would take longer than
// to connect one.
func (s sysfs) visible() error {
	_, err := os.Stat(s.sys.path("sys/block"))
	return err
}

// exists returns an error that matches os.ErrNotExist when there is no such device.
func (s sysfs) exists(index int) error {
	_, err := os.Stat(s.sys.block(index))
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("there is no such device: %w", os.ErrNotExist)
	}
	return err
}

// life reads which use of the index this is.
func (s sysfs) life(index int) (life, error) {
	for {
		l, err := s.owner(index)
		if err != nil || !l.connected {
			return l, errors.Join(err, s.exists(index))
		}
		// nbd_genl_connect makes `backend` before `pid`, and nbd_config_put removes it after `pid`: while that is the same
		// file, so is the identifier.
		l.identifier, l.identified, err = s.attribute(index, "backend")
		if err != nil {
			return life{}, err
		}
		birth, err := fileNumber(s.ownerPath(index))
		if birth == l.birth && err == nil {
			return l, nil
		}
		if err != nil && !gone(err) {
			return life{}, err
		}
	}
}

func (s sysfs) ownerPath(index int) string { return filepath.Join(s.sys.block(index), "pid") }

// owner reads the `pid` file alone.
func (s sysfs) owner(index int) (life, error) {
	birth, pid, err := readOwner(s.ownerPath(index), s.readTID)
	if gone(err) {
		return life{}, nil
	}
	if err != nil {
		return life{}, err
	}
	l := life{connected: true, birth: birth}
	if !s.readTID {
		return l, nil
	}
	if l.tid, err = strconv.Atoi(strings.TrimSpace(string(pid))); err != nil {
		return life{}, fmt.Errorf("%s: pid: %w", name(index), err)
	}
	return l, nil
}

// gone reports whether err says that the attribute does not exist, or was removed while it was open.
func gone(err error) bool { return errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ENODEV) }

// attribute reads a file of the device's directory; ok is false when there is none, or no device.
func (s sysfs) attribute(index int, file string) (value string, ok bool, err error) {
	b, err := readAttribute(filepath.Join(s.sys.block(index), file))
	if gone(err) {
		return "", false, nil
	}
	if err != nil {
		return "", false, err
	}
	return strings.TrimSuffix(string(b), "\n"), true, nil
}

// number reads a file that holds a decimal number; a missing one counts as 0.
func (s sysfs) number(index int, file string) (uint64, error) {
	value, ok, err := s.attribute(index, file)
	if err != nil || !ok {
		return 0, err
	}
	n, err := strconv.ParseUint(value, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%s: %s %q is not a number", name(index), file, value)
	}
	return n, nil
}

// size returns the device's size in bytes.
func (s sysfs) size(index int) (int64, error) {
	sectors, err := s.number(index, "size")
	// Linux 5.10 takes any size, a negative one too.
	return int64(min(sectors, math.MaxInt64/sectorSize)) * sectorSize, err
}

// partitions returns the names of the device's partitions, ascending.
func (s sysfs) partitions(index int) ([]string, error) {
	paths, err := filepath.Glob(filepath.Join(s.sys.block(index), name(index)+"p*"))
	if err != nil {
		return nil, err
	}
	names := make([]string, len(paths))
	for i, p := range paths {
		names[i] = filepath.Base(p)
	}
	return names, nil
}
