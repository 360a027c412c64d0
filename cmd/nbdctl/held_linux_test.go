package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
)

// TestKernelHeld shows that a device in use is not disconnected, and that the
// user learns by whom, for each way to use one.
func TestKernelHeld(t *testing.T) {
	const mkfs = "mkfs.ext4 -q $DEV; mkdir -p $TMP/mnt; "
	for _, tt := range []struct {
		name       string
		hold, free string
		says       []string
	}{
		{"mount", mkfs + "mount $DEV $TMP/mnt", "umount $TMP/mnt", []string{"mount", "/mnt"}},
		{
			"mount in another namespace",
			mkfs + `setsid unshare -m --propagation private ` +
				`sh -c "mount $DEV $TMP/mnt; echo \$\$ >$TMP/pid; exec sleep 1000" >/dev/null 2>&1 & ` +
				`until test -s $TMP/pid; do sleep 0.05; done`,
			"kill $(cat $TMP/pid)",
			[]string{"mount", "/mnt", "sleep"},
		},
		{
			"opener",
			"setsid sleep 1000 <$DEV >/dev/null 2>&1 & echo $! >$TMP/pid",
			"kill $(cat $TMP/pid)",
			[]string{"process ", "sleep"},
		},
		{
			"device mapper",
			"modprobe dm-mod; echo 0 2048 linear $DEV 0 | dmsetup create --noudevsync above",
			"dmsetup remove --noudevsync above",
			[]string{"above"},
		},
		{"swap", "mkswap -q $DEV 2>/dev/null; swapon $DEV", "swapoff $DEV", []string{"swap"}},
		{
			"partition",
			"printf 'label: dos\n2048\n' | sfdisk -q --no-tell-kernel $DEV; blockdev --rereadpt $DEV; " +
				"mkfs.ext4 -q ${DEV}p1; mkdir -p $TMP/mnt; mount ${DEV}p1 $TMP/mnt",
			"umount $TMP/mnt",
			[]string{"mount", "p1"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			requireKernel(t)
			dev := connected(t, "memory", "--size", "64M")
			env := "DEV=" + dev + " TMP=" + t.TempDir() + "; "
			sh(t, env+tt.hold)
			r := nbdctl(t, "disconnect", dev)
			if r.code != int(exit.Busy) {
				t.Errorf("exit code %d", r.code)
			}
			for _, word := range append(tt.says, filepath.Base(dev), "--force") {
				if !strings.Contains(r.stderr, word) {
					t.Errorf("stderr is %q, want %q in it", r.stderr, word)
				}
			}
			t.Log(strings.TrimSpace(r.stderr))
			if d := listed(t, dev); d == nil || d["state"] != "live" {
				t.Errorf("after the refusal list shows %v", d)
			}
			if holders := statusOf(t, dev)["holders"].([]any); len(holders) == 0 {
				t.Error("status shows no holder")
			}
			// And it still works.
			sh(t, "dd if="+dev+" of=/dev/null bs=4k count=1 iflag=direct status=none")
			sh(t, env+tt.free)
			must(t, "disconnect", dev)
		})
	}
}

// TestKernelHeldAbove shows that disconnect is refused, and the holder named, where what uses
// the device is not a mount, swap or a process: what stands on it and on others, and what
// nobody can see any more. The kernel's side of LVM and LUKS is all the device mapper's.
func TestKernelHeldAbove(t *testing.T) {
	requireKernel(t)
	tar, err := filepath.Abs("../../server/blockdev/testdata/btrfs.tar.gz")
	if err != nil {
		t.Fatal(err)
	}
	dev := []string{connected(t, "memory", "--size", "32M"), connected(t, "memory", "--size", "32M")}
	// The kernel tells of no mount that has been taken away from its place, nor on which further
	// devices a file system lies.
	const unseen = "an exclusive user that could not be found"
	const mapper = "modprobe -q dm-mod || true; dmsetup create --noudevsync "
	for _, tt := range []struct {
		name, hold, free string
		devices          int
		says             []string // of each device, the last of all that follow
	}{
		{
			"LVM",
			mapper + `vg0-root --uuid LVM-vg0root --table "0 8192 linear $A 2048
8192 8192 linear $B 2048"`,
			"dmsetup remove --noudevsync vg0-root",
			2, []string{"vg0-root"},
		},
		{
			"LUKS",
			mapper + `luks-home --uuid CRYPT-LUKS2-home ` +
				`--table "0 8192 crypt aes-xts-plain64 $(printf '%064d' 7) 0 $A 2048"`,
			"dmsetup remove --noudevsync luks-home",
			1, []string{"luks-home"},
		},
		{
			"md",
			`modprobe -q md-mod; modprobe -q raid1
echo md_held >/sys/module/md_mod/parameters/new_array; cd /sys/block/md_held/md
echo none >metadata_version; echo raid1 >level; echo 2 >raid_disks
cat /sys/block/${A#/dev/}/dev >new_dev; cat /sys/block/${B#/dev/}/dev >new_dev
echo 0 >dev-${A#/dev/}/slot; echo 1 >dev-${B#/dev/}/slot
for d in dev-nbd*; do echo 16384 >$d/size; done
echo active >array_state; grep -q 'md_held : active raid1' /proc/mdstat`,
			"echo clear >/sys/block/md_held/md/array_state",
			2, []string{"md_held"},
		},
		{
			"lazy unmount",
			`mkfs.ext4 -q $A; mkdir $TMP/mnt; mount $A $TMP/mnt
setsid sleep 1000 >$TMP/mnt/open 2>&1 </dev/null & echo $! >$TMP/pid
until test -e $TMP/mnt/open; do sleep 0.01; done; umount -l $TMP/mnt`,
			"kill $(cat $TMP/pid)",
			1, []string{unseen},
		},
		{
			"btrfs on two devices",
			`tar xzf $BTRFS -C $TMP
dd if=$TMP/first of=$A bs=1M oflag=direct status=none
dd if=$TMP/second of=$B bs=1M oflag=direct status=none
modprobe -q btrfs || true; mkdir $TMP/mnt; mount -t btrfs -o device=$B $A $TMP/mnt`,
			"umount $TMP/mnt",
			2, []string{"mount of nbd", unseen},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			env := "A=" + dev[0] + " B=" + dev[1] + " TMP=" + t.TempDir() + " BTRFS=" + tar + "; "
			sh(t, env+tt.hold)
			for i, d := range dev[:tt.devices] {
				r := nbdctl(t, "disconnect", d)
				if r.code != int(exit.Busy) {
					t.Errorf("%s: exit code %d", d, r.code)
				}
				holder := tt.says[min(i, len(tt.says)-1)]
				for _, word := range []string{holder, filepath.Base(d), "--force"} {
					if !strings.Contains(r.stderr, word) {
						t.Errorf("stderr is %q, want %q in it", r.stderr, word)
					}
				}
				t.Log(strings.TrimSpace(r.stderr))
				if holders := statusOf(t, d)["holders"].([]any); (len(holders) == 0) != (holder == unseen) {
					t.Errorf("status shows the holders %v", holders)
				}
				sh(t, "dd if="+d+" of=/dev/null bs=4k count=1 iflag=direct status=none")
			}
			sh(t, env+tt.free)
			eventually(t, func() bool {
				f, err := os.OpenFile(dev[0], os.O_RDONLY|syscall.O_EXCL, 0)
				if err == nil {
					f.Close()
				}
				return err == nil
			}, "the end of its use")
		})
	}
	for _, d := range dev {
		must(t, "disconnect", d)
	}
}

// TestKernelForce shows what --force does to a mounted device: it goes at
// once, the file system above fails, and the index is free when it is unmounted.
func TestKernelForce(t *testing.T) {
	requireKernel(t, `I/O error|EXT4-fs|Aborting journal|JBD2|NBD_DISCONNECT|Buffer I/O`)
	dev := connected(t, "memory", "--size", "64M")
	mnt := t.TempDir()
	sh(t, "mkfs.ext4 -q "+dev+"; mount "+dev+" "+mnt)
	r := nbdctl(t, "disconnect", "--force", dev)
	if r.code != 0 || !strings.Contains(r.stderr, "mount") {
		t.Errorf("code %d, stderr %q", r.code, r.stderr)
	}
	read := exec.Command("dd", "if="+dev, "of=/dev/null", "bs=4k", "count=1", "iflag=direct")
	if out, err := read.CombinedOutput(); err == nil {
		t.Errorf("the device can still be read: %s", out)
	}
	if d := listed(t, dev); d == nil || d["state"] != "disconnecting" {
		t.Errorf("list shows %v, want it disconnecting", d)
	}
	sh(t, "umount "+mnt)
	eventually(t, func() bool { return listed(t, dev) == nil }, "%s free", dev)
	index := strings.TrimPrefix(dev, "/dev/")
	again := connected(t, "memory", "--size", "1M", "--device", index)
	must(t, "disconnect", again)
	awaitNoServer(t)
}
