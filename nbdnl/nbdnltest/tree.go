package nbdnltest

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// A tree is the part of /sys, /proc and /dev that a driver and its users show.
type tree struct {
	t    testing.TB
	root string

	graves int // number of files that were buried
	// discards is whether discard_max_bytes is shown of all devices, as Linux 5.10 does of those
	// that were used before.
	discards bool
}

func (t *tree) init(release string) {
	t.mkdir("sys/block")
	t.mkdir("dev")
	t.write(release+"\n", "proc/sys/kernel/osrelease")
	t.write("Filename\tType\tSize\tUsed\tPriority\n", "proc/swaps")
	t.write("", "proc/self/mountinfo")
	t.link("pid:[4026531836]", "proc/self/ns/pid")
	t.link("mnt:[1]", "proc/self/ns/mnt")
	t.thread(os.Getpid())
}

// thread shows a thread of this process.
func (t *tree) thread(tid int) {
	t.write(fmt.Sprintf("Name:\tserver\nTgid:\t%d\n", os.Getpid()), "proc", itoa(tid), "status")
}

// add shows a device.
func (t *tree) add(index int) {
	t.write(number(index, 0)+"\n", attribute(index, "dev"))
	t.write("0\n", attribute(index, "ro"))
	t.write("512\n", attribute(index, "queue/logical_block_size"))
	t.mkdir(attribute(index, "holders"))
	t.write("", "dev", name(index))
	t.size(index, 0)
}

// size shows a device's size, which is given in bytes.
func (t *tree) size(index int, size uint64) {
	t.write(strconv.FormatUint(size>>9, 10)+"\n", attribute(index, "size"))
}

// queue shows the server's flags that the kernel acts upon as limits of the device's queue.
func (t *tree) queue(index int, flags uint64) {
	cache, granularity, discard, zeroes := "write through", "0", "0", "0"
	if t.discards {
		discard = "2199023255040"
	}
	if flags&nbdFlagSendFlush != 0 {
		cache = "write back"
	}
	if flags&nbdFlagSendTrim != 0 {
		granularity, discard = "512", "2199023255040"
	}
	if flags&nbdFlagSendWriteZeroes != 0 {
		zeroes = "4294966784"
	}
	t.write(cache+"\n", attribute(index, "queue/write_cache"))
	t.write(bit(flags&nbdFlagSendFUA != 0), attribute(index, "queue/fua"))
	t.write(bit(flags&nbdFlagRotational != 0), attribute(index, "queue/rotational"))
	t.write(discard+"\n", attribute(index, "queue/discard_max_bytes"))
	t.write(granularity+"\n", attribute(index, "queue/discard_granularity"))
	t.write(zeroes+"\n", attribute(index, "queue/write_zeroes_max_bytes"))
}

// partition shows a partition.
func (t *tree) partition(index, n int) {
	p := name(index) + "p" + itoa(n)
	t.write(number(index, n)+"\n", attribute(index, p), "dev")
	t.write("", "dev", p)
}

// dropPartitions hides the partitions of a device.
func (t *tree) dropPartitions(index int) {
	for _, pattern := range []string{"dev", "sys/block/" + name(index)} {
		paths, err := filepath.Glob(filepath.Join(t.root, pattern, name(index)+"p*"))
		t.check(err)
		for _, p := range paths {
			t.check(os.RemoveAll(p))
		}
	}
}

// process shows a process that has a device open.
func (t *tree) process(pid int, comm string, index int) {
	dir := filepath.Join("proc", itoa(pid))
	t.write(comm+"\n", dir, "comm")
	t.write("flags:\t0100000\n", dir, "fdinfo/3")
	t.link("mnt:[1]", dir, "ns/mnt")
	t.link(filepath.Join(t.root, "dev", name(index)), dir, "fd/3")
}

// mount shows a mount of a device; unmount hides it.
func (t *tree) mount(index int, point string) {
	line := fmt.Sprintf("60 1 %s / %s rw,relatime shared:1 - ext4 /dev/%s rw\n",
		number(index, 0), escape(point), name(index))
	t.write(t.read("proc/self/mountinfo")+line, "proc/self/mountinfo")
}

func (t *tree) unmount(point string) {
	var rest strings.Builder
	for line := range strings.Lines(t.read("proc/self/mountinfo")) {
		if strings.Fields(line)[4] != escape(point) {
			rest.WriteString(line)
		}
	}
	t.write(rest.String(), "proc/self/mountinfo")
}

// deviceNumber returns the number of the device whose node a path leads to.
func (t *tree) deviceNumber(path string) (string, bool) {
	path, err := filepath.EvalSymlinks(path)
	if err != nil || filepath.Dir(path) != filepath.Join(t.root, "dev") {
		return "", false
	}
	disk, partition, _ := strings.Cut(strings.TrimPrefix(filepath.Base(path), "nbd"), "p")
	index, err := strconv.Atoi(disk)
	if err != nil {
		return "", false
	}
	n, _ := strconv.Atoi(partition) // none is 0, the disk itself
	return number(index, n), true
}

// write replaces a file at once, as an attribute changes at once.
func (t *tree) write(content string, elem ...string) {
	path := filepath.Join(append([]string{t.root}, elem...)...)
	t.check(os.MkdirAll(filepath.Dir(path), 0o755))
	// A name that no reader looks for; all writers hold the kernel's lock.
	tmp := filepath.Join(t.root, "new")
	t.check(os.WriteFile(tmp, []byte(content), 0o644))
	t.check(os.Rename(tmp, path))
}

func (t *tree) read(path string) string {
	b, err := os.ReadFile(filepath.Join(t.root, path))
	t.check(err)
	return string(b)
}

func (t *tree) link(target string, elem ...string) {
	path := filepath.Join(append([]string{t.root}, elem...)...)
	t.check(os.MkdirAll(filepath.Dir(path), 0o755))
	t.check(os.Symlink(target, path))
}

func (t *tree) mkdir(path string) { t.check(os.MkdirAll(filepath.Join(t.root, path), 0o755)) }

func (t *tree) remove(elem ...string) {
	t.check(os.RemoveAll(filepath.Join(append([]string{t.root}, elem...)...)))
}

// bury hides a file and keeps its inode from being used again, as kernfs does.
func (t *tree) bury(path string) {
	t.graves++
	t.mkdir("graves")
	t.check(os.Rename(filepath.Join(t.root, path), filepath.Join(t.root, "graves", itoa(t.graves))))
}

func (t *tree) check(err error) {
	if err != nil {
		t.t.Errorf("fake kernel: %v", err)
	}
}

// attribute returns the path of a file of the device in sysfs.
func attribute(index int, file string) string { return filepath.Join("sys/block", name(index), file) }

// number returns the number of a device or, from 1 on, a partition.
func number(index, partition int) string {
	const minors = 32 // for max_part=16
	return fmt.Sprintf("%d:%d", nbdMajor, index*minors+partition)
}

func name(index int) string { return "nbd" + itoa(index) }

func itoa(n int) string { return strconv.Itoa(n) }

func bit(b bool) string {
	if b {
		return "1\n"
	}
	return "0\n"
}

// escape writes a path as mountinfo does.
func escape(path string) string { return strings.ReplaceAll(path, " ", `\040`) }
