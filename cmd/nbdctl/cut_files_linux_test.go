package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// cutFiles are files of a file system on a device, which are replaced all the time: each new one is
// synced, gets the name of the old one, and the directory is synced.
type cutFiles struct {
	*powerCuts
	image string
	mnt   string
	saves []cutSave // of which only one goroutine makes some
}

// A cutSave is a file that replaced the one of that name.
type cutSave struct {
	name         string
	began, ended int64
}

func (p *powerCuts) fileSystem(image, dev string) {
	p.t.Helper()
	f := &cutFiles{powerCuts: p, image: image, mnt: p.t.TempDir()}
	sh(p.t, "mkfs.ext4 -q -J size=1 "+dev+"; mount "+dev+" "+f.mnt)
	p.t.Cleanup(func() { finish(p.t, command(p.t, "sh", "-c", "umount "+f.mnt+" 2>/dev/null")) })
	p.files = append(p.files, f)
}

func (f *cutFiles) work(r *rand.Rand, stop <-chan struct{}) error {
	for {
		select {
		case <-stop:
			return nil
		default:
		}
		if err := f.save(fmt.Sprintf("file%d", r.IntN(8)), 1+r.IntN(100_000)); err != nil {
			return fmt.Errorf("%s: %w", f.image, err)
		}
	}
}

func (f *cutFiles) save(name string, size int) error {
	f.flushing.RLock()
	defer f.flushing.RUnlock()
	s := cutSave{name: name, began: f.clock.tick()}
	path := filepath.Join(f.mnt, name)
	next, err := os.Create(path + ".next")
	if err != nil {
		return err
	}
	_, err = next.Write(cutContent(len(f.saves), size))
	if err = errors.Join(err, next.Sync(), next.Close()); err != nil {
		return err
	}
	if err := os.Rename(path+".next", path); err != nil {
		return err
	}
	dir, err := os.Open(f.mnt)
	if err != nil {
		return err
	}
	if err := errors.Join(dir.Sync(), dir.Close()); err != nil {
		return err
	}
	s.ended = f.clock.tick()
	f.saves = append(f.saves, s)
	return nil
}

// cutContent is what a save puts into its file: its number, its size, and bytes that only it has.
func cutContent(number, size int) []byte {
	p := binary.LittleEndian.AppendUint64(nil, uint64(number))
	p = binary.LittleEndian.AppendUint64(p, uint64(size))
	r := rand.NewPCG(uint64(number), uint64(size))
	for len(p) < 16+size {
		p = binary.LittleEndian.AppendUint64(p, r.Uint64())
	}
	return p
}

// restored mounts the file system of an image after a cut, and holds that each file is whole and
// the one that was synced last, or one after that, and that the file system is clean.
func (f *cutFiles) restored(image string, c cut) (err error) {
	mnt := filepath.Join(f.again, "inner")
	if err := mountImage(image, mnt, "ext4"); err != nil {
		return err
	}
	synced := make(map[string]int) // the last save of a name
	for i, s := range f.saves {
		if s.ended < c.after {
			synced[s.name] = i
		}
	}
	for i := range 8 {
		name := fmt.Sprintf("file%d", i)
		content, e := os.ReadFile(filepath.Join(mnt, name))
		if e := f.saved(name, content, e, synced, c); e != nil {
			err = errors.Join(err, e)
		}
	}
	err = errors.Join(err, unix.Unmount(mnt, 0))
	if r := finish(f.t, command(f.t, "e2fsck", "-fn", image)); r.code != 0 {
		err = errors.Join(err, fmt.Errorf("e2fsck: %d: %s%s", r.code, r.stdout, r.stderr))
	}
	return err
}

func (f *cutFiles) saved(name string, content []byte, e error, synced map[string]int, c cut) error {
	last, is := synced[name]
	if errors.Is(e, fs.ErrNotExist) && !is {
		return nil
	}
	if e != nil {
		return e
	}
	if len(content) < 16 {
		return fmt.Errorf("%s has %d bytes", name, len(content))
	}
	number := int(binary.LittleEndian.Uint64(content))
	size := int(binary.LittleEndian.Uint64(content[8:]))
	switch {
	case number >= len(f.saves) || f.saves[number].name != name || f.saves[number].began > c.before:
		return fmt.Errorf("%s has what was never saved there: %.16x", name, content)
	case size > 1<<20 || !bytes.Equal(content, cutContent(number, size)):
		return fmt.Errorf("%s has a part of save %d", name, number)
	case is && number < last:
		return fmt.Errorf("%s is save %d, and save %d was synced", name, number, last)
	}
	return nil
}

// mountImage mounts a file by a loop device, which goes with the mount. To start the programs that
// do that takes most of a second in the lab.
func mountImage(image, mnt, kind string) error {
	control, err := unix.Open("/dev/loop-control", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(control)
	n, err := unix.IoctlRetInt(control, unix.LOOP_CTL_GET_FREE)
	if err != nil {
		return err
	}
	path := fmt.Sprintf("/dev/loop%d", n)
	loop, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(loop)
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	c := unix.LoopConfig{Fd: uint32(f.Fd()), Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR}}
	if err := unix.IoctlLoopConfigure(loop, &c); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if err := unix.Mount(path, mnt, kind, 0, ""); err != nil {
		return fmt.Errorf("mount %s: %w", image, err)
	}
	return nil
}
