package main

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/backends/nbd"
)

// TestKernelPowerCut cuts off the power of the machine under devices whose images are files: what
// was flushed is there, each time, and what else is there was written. Below the file system that
// has the images, the log-writes target of the device mapper notes what a disk with a cache that
// loses everything would have had at any moment.
func TestKernelPowerCut(t *testing.T) {
	ext4 := onExt4
	ext4.make += " -J size=4 -E lazy_itable_init=0,lazy_journal_init=0"
	for _, below := range []fsKind{ext4, onXFS} {
		t.Run(below.name, func(t *testing.T) {
			requireKernel(t)
			requireLogWrites(t)
			p := newPowerCuts(t, below)
			p.load()
			p.examine()
		})
	}
}

// requireLogWrites skips the test where the kernel has no such target. Those of the lab have it.
func requireLogWrites(t *testing.T) {
	t.Helper()
	targets := "modprobe -q dm-mod; modprobe -q dm-log-writes; dmsetup targets | grep -q ^log-writes"
	if r := finish(t, command(t, "sh", "-c", targets)); r.code == 0 {
		return
	}
	if os.Getenv("NBD_TEST_REQUIRE") == "1" {
		t.Fatal("this kernel has no dm-log-writes")
	}
	t.Skip("this kernel has no dm-log-writes")
}

// powerCuts are those of one load.
type powerCuts struct {
	t     *testing.T
	dir   string // has first, the disk as it was before the load, and log
	again string // a directory for the disk as it was at a cut, which need not last
	below fsKind
	clock cutClock
	rand  *rand.Rand

	// A cut that is to find nothing flushed since what was acknowledged last locks it for writing.
	flushing sync.RWMutex
	force    func(sector int) error // writes a sector with FUA

	disks []*cutDisk
	files []*cutFiles
	cuts  []cut
}

// A cutDisk is a device that is written without a file system.
type cutDisk struct {
	*powerCuts
	image string
	dev   string
	model *cutModel
}

const cutSectors = 1024 // of a device, which are written again and again

func newPowerCuts(t *testing.T, below fsKind) *powerCuts {
	t.Helper()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	p := &powerCuts{t: t, dir: imageDir(t), again: t.TempDir(), below: below}
	p.rand = rand.New(rand.NewPCG(seed, 0))
	sh(t, "modprobe -q loop || true; cd "+p.dir+`
		truncate -s 96M disk; `+below.make+` disk; cp --sparse=always disk first; truncate -s 3G log`)
	return p
}

// load has everything written to that is there, while the power is cut off.
func (p *powerCuts) load() {
	p.t.Helper()
	t, mnt := p.t, p.t.TempDir()
	// The loop device on top makes flushes of FUA. The log would have a write with FUA before
	// others that were acknowledged earlier and flushed later: replayed, they would undo it.
	sh(t, "cd "+p.dir+`; disk=$(losetup --find --show disk) log=$(losetup --find --show log)
		dmsetup create --noudevsync cut --table "0 $(blockdev --getsz $disk) log-writes $disk $log"
		dmsetup mknodes; top=$(losetup --find --show --direct-io=on /dev/mapper/cut)
		echo $disk $log >loops; echo $top >top; mount $top `+mnt)
	defer sh(t, "cd "+p.dir+"; umount "+mnt+`
		losetup --detach $(cat top); dmsetup remove --retry --noudevsync cut; losetup --detach $(cat loops)`)
	// Whatever fails, nothing may keep the file system below from being unmounted.
	defer awaitNoServer(t)

	image := func(name string) string { return filepath.Join(mnt, name) }
	file := func(name, size string, more ...string) []string {
		return append([]string{"file", image(name), "--create", "--size", size}, more...)
	}
	var devs []string
	connect := func(args ...string) string {
		devs = append(devs, connected(t, args...))
		return devs[len(devs)-1]
	}
	var servers []*far
	serve := func(name string) string {
		args := append(file(name, "1M"), "--listen", "unix:"+filepath.Join(shortDir(t), "s"))
		servers = append(servers, farServer(t, args...))
		return servers[len(servers)-1].uri
	}
	defer func() {
		for _, dev := range devs {
			must(t, "disconnect", dev)
		}
		for _, s := range servers {
			s.kill()
		}
	}()
	p.disk("buffered", connect(file("buffered", "1M")...))
	p.disk("direct", connect(file("direct", "1M", "-o", "direct=on")...))
	far := serve("far")
	p.disk("far", connect(far, "-o", "way=direct"))
	p.disk("relayed", connect(serve("relayed"), "-o", "way=relay"))
	p.fileSystem("mounted", connect(file("mounted", "16M")...))
	p.fileSystem("mounted-direct", connect(file("mounted-direct", "16M", "-o", "direct=on")...))

	client, err := nbd.Dial(t.Context(), far, nbd.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	p.force = func(sector int) error { return p.disks[2].force(client, sector) }
	p.cut() // before there is something to lose
	stop := make(chan struct{})
	var work sync.WaitGroup
	run := func(f func(*rand.Rand, <-chan struct{}) error) {
		r := rand.New(rand.NewPCG(p.rand.Uint64(), 0))
		work.Go(func() {
			if err := f(r, stop); err != nil {
				t.Error(err)
			}
		})
	}
	for _, d := range p.disks {
		for range 3 {
			run(d.work)
		}
	}
	run(p.forceAccess)
	for _, f := range p.files {
		run(f.work)
	}
	for range rounds("NBD_TEST_POWER_CUTS", 4) / 2 {
		<-time.After(time.Duration(100+p.rand.IntN(500)) * time.Millisecond)
		p.cut()
	}
	close(stop)
	work.Wait()
	for _, f := range p.files {
		sh(t, "umount "+f.mnt)
	}
}

// cut notes a moment at which the power is to be off. Of half of them nothing is flushed by anybody
// between what was acknowledged last, which is a write with FUA, and the moment.
func (p *powerCuts) cut() {
	p.t.Helper()
	if p.rand.IntN(2) == 0 || len(p.cuts) == 1 {
		p.flushing.Lock()
		defer p.flushing.Unlock()
		if err := p.force(p.rand.IntN(cutSectors)); err != nil {
			p.t.Error(err)
		}
	}
	after := p.clock.tick()
	sh(p.t, fmt.Sprintf("dmsetup message cut 0 mark %d", len(p.cuts)))
	p.cuts = append(p.cuts, cut{after, p.clock.tick()})
}

func (p *powerCuts) disk(image, dev string) {
	d := &cutDisk{powerCuts: p, image: image, dev: dev, model: newCutModel(&p.clock, cutSectors)}
	p.disks = append(p.disks, d)
}

// work writes to a device, with and without FUA, and flushes it. Half of the writes go to a few
// sectors, and some come twice.
func (d *cutDisk) work(r *rand.Rand, stop <-chan struct{}) error {
	fd, err := unix.Open(d.dev, unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	// O_DIRECT wants memory that is aligned.
	buf, err := unix.Mmap(-1, 0, 16*cutSector, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	defer unix.Munmap(buf)
	for {
		select {
		case <-stop:
			return nil
		default:
		}
		n := 1 + r.IntN(16)
		sector := r.IntN(cutSectors - n)
		if r.IntN(2) == 0 {
			sector = r.IntN(32)
		}
		var err error
		switch r.IntN(8) {
		case 0:
			err = d.flush(fd)
		case 1:
			err = d.write(fd, buf, sector, n, unix.RWF_DSYNC)
		case 2:
			err = errors.Join(d.write(fd, buf, sector, n, 0), d.write(fd, buf, sector, n, 0), d.flush(fd))
		default:
			err = d.write(fd, buf, sector, n, 0)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", d.image, err)
		}
	}
}

// forceAccess writes to an export with FUA, and never flushes it, as no kernel does.
func (p *powerCuts) forceAccess(r *rand.Rand, stop <-chan struct{}) error {
	for {
		select {
		case <-stop:
			return nil
		default:
		}
		p.flushing.RLock()
		err := p.force(r.IntN(cutSectors))
		p.flushing.RUnlock()
		if err != nil {
			return err
		}
	}
}

func (d *cutDisk) force(client *nbd.Client, sector int) error {
	seq := d.model.write(sector, 1, true)
	if _, err := client.WriteAtFUA(cutPattern(seq, sector), int64(sector)*cutSector); err != nil {
		return fmt.Errorf("%s: %w", d.image, err)
	}
	d.model.wrote(seq)
	return nil
}

func (d *cutDisk) write(fd int, buf []byte, sector, n, flags int) error {
	if flags != 0 {
		d.flushing.RLock()
		defer d.flushing.RUnlock()
	}
	seq := d.model.write(sector, n, flags != 0)
	for i := range n {
		copy(buf[i*cutSector:], cutPattern(seq, sector+i))
	}
	if _, err := unix.Pwritev2(fd, [][]byte{buf[:n*cutSector]}, int64(sector)*cutSector, flags); err != nil {
		return err
	}
	d.model.wrote(seq)
	return nil
}

func (d *cutDisk) flush(fd int) error {
	d.flushing.RLock()
	defer d.flushing.RUnlock()
	began := d.clock.tick()
	if err := unix.Fdatasync(fd); err != nil {
		return err
	}
	d.model.flushed(began)
	return nil
}

// examine makes the disk as it was at each cut, and between that and the one before at a place
// where the cache was half empty, and holds that everything is there then.
func (p *powerCuts) examine() {
	t := p.t
	t.Helper()
	if t.Failed() {
		return
	}
	log := openWriteLog(t, filepath.Join(p.dir, "log"))
	disk, err := os.OpenFile(filepath.Join(p.dir, "first"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	t.Cleanup(func() { // if something fails
		finish(t, command(t, "sh", "-c", "cd "+p.again+" && umount inner mnt 2>/dev/null"))
	})
	cuts := 0
	done, last := 0, cut{} // entries replayed, and the last cut before
	forward := func(to int) {
		if err := log.replay(disk, done, to); err != nil {
			t.Fatal(err)
		}
		done = to
	}
	for i, c := range p.cuts {
		mark, found := log.marks[fmt.Sprint(i)]
		if !found {
			t.Fatalf("the log has no mark of cut %d", i)
		}
		if i > 0 && done < mark-1 {
			forward(done + p.rand.IntN(mark-done))
			cuts++
			if err := p.restored("first", cut{last.after, c.before}); err != nil {
				t.Errorf("before cut %d: %v", i, err)
			}
		}
		forward(mark)
		cuts++
		if err := p.restored("first", c); err != nil {
			t.Errorf("cut %d: %v", i, err)
		}
		last = c
	}
	t.Logf("%d cuts, %d writes and flushes below in the log", cuts, len(log.entries))
	for _, d := range p.disks {
		t.Logf("%s: %d writes, %d flushes", d.image, len(d.model.writes), len(d.model.flushes))
	}
	for _, f := range p.files {
		t.Logf("%s: %d files synced", f.image, len(f.saves))
	}
	end := cut{p.clock.tick(), p.clock.tick()}
	if err := p.restored("disk", end); err != nil {
		t.Errorf("without a cut: %v", err)
	}
	// The check can fail: the disk is not as it has to be after everything.
	if err := p.restored("first", end); err == nil {
		t.Error("the last cut has lost nothing of what was flushed after it")
	}
}

// restored mounts a copy of a disk, and holds that it has what it must have after a cut.
func (p *powerCuts) restored(disk string, c cut) (err error) {
	t, mnt := p.t, filepath.Join(p.again, "mnt")
	sh(t, "cd "+p.again+"; cp --sparse=always "+p.dir+"/"+disk+" disk; mkdir -p mnt inner")
	if err := mountImage(filepath.Join(p.again, "disk"), mnt, p.below.name); err != nil {
		return err
	}
	for _, d := range p.disks {
		content, e := os.ReadFile(filepath.Join(mnt, d.image))
		if e == nil {
			e = d.model.check(content, c)
		}
		if e != nil {
			err = errors.Join(err, fmt.Errorf("%s: %w", d.image, e))
		}
	}
	for _, f := range p.files {
		if e := f.restored(filepath.Join(mnt, f.image), c); e != nil {
			err = errors.Join(err, fmt.Errorf("%s: %w", f.image, e))
		}
	}
	err = errors.Join(err, unix.Unmount(mnt, 0))
	sh(t, "cd "+p.again+"; "+p.below.check+" disk >check 2>&1 || { cat check; exit 1; }")
	return err
}
