package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/backends/memory"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"github.com/nbdctl/nbdctl/server"
)

// nobody is a user without privileges, for commandAs.
const nobody = "--reuid 65534 --regid 65534 --clear-groups"

// commandAs prepares a run of nbdctl with the privileges that setpriv leaves it.
func commandAs(t testing.TB, user string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := nbdctlCommand(t, args...)
	cmd.Args = append(append([]string{"setpriv"}, strings.Fields(user)...), cmd.Args...)
	cmd.Path = "/usr/bin/setpriv"
	return cmd
}

// TestKernelRefused shows that each of these fails with its own message and
// the documented code, and changes nothing.
func TestKernelRefused(t *testing.T) {
	requireKernel(t, `^nbd: nbd\d+ already in use$`)
	dir := imageDir(t)
	sh(t, fmt.Sprintf("cd %s; truncate -s 1M used.img odd.img locked.img secret.img; truncate -s 1000 small.img; chmod 0 secret.img; mkfifo fifo", dir))
	in := func(name string) string { return filepath.Join(dir, name) }
	dev := connected(t, "file", in("used.img"), "--name", "used")
	before := sh(t, "cd "+dir+"; sha256sum *.img; ls -l")
	list := must(t, "list", "--json", "--all")

	as := func(user string, args ...string) *exec.Cmd { return commandAs(t, user, args...) }
	root := func(args ...string) *exec.Cmd { return nbdctlCommand(t, args...) }
	for _, tt := range []struct {
		name string
		cmd  *exec.Cmd
		code exit.Code
		says string
	}{
		{"taken device", root("connect", "memory", "--size", "1M", "--device", dev), exit.Busy, filepath.Base(dev) + " is connected already, by pid "},
		{"impossible device", root("connect", "memory", "--size", "1M", "--device", "nbd99999999"), exit.Usage, "99999999"},
		{"size zero", root("connect", "memory", "--size", "0"), exit.Usage, "--size 0"},
		{"size no multiple", root("connect", "memory", "--size", "1000"), exit.Usage, "multiple of the block size 512"},
		{"wrong block size", root("connect", "memory", "--size", "1M", "--block-size", "1000"), exit.Usage, "--block-size 1000"},
		{"block size above this kernel's", root("connect", "memory", "--size", "1M", "--block-size", "65536"), exit.Unsupported, "65536"},
		{"unknown backend", root("connect", "floppy"), exit.Usage, `"floppy"`},
		{"missing file", root("connect", "file", in("missing.img")), exit.Failure, "missing.img"},
		{"directory", root("connect", "file", dir), exit.Failure, "directory"},
		{"fifo", root("connect", "file", in("fifo")), exit.Failure, "fifo"},
		{"file too small for a block", root("connect", "file", in("small.img"), "--block-size", "1024"), exit.Failure, "small.img"},
		{"other size than asked", root("connect", "file", in("odd.img"), "--size", "2M"), exit.Usage, "odd.img"},
		{"create would change the size", root("connect", "file", in("odd.img"), "--size", "2M", "--create"), exit.Usage, "odd.img"},
		{"create in a missing directory", root("connect", "file", in("no/disk.img"), "--size", "2M", "--create"), exit.Failure, "no/disk.img"},
		{"file without permission", as("--bounding-set -dac_override,-dac_read_search --inh-caps -dac_override,-dac_read_search", "connect", "file", in("secret.img")), exit.Permission, "secret.img"},
		{"attached image", root("connect", "file", in("used.img")), exit.Busy, "pid "},
		{"attached image, read-only", root("connect", "file", in("used.img"), "--read-only"), exit.Busy, "pid "},
		{"name in use", root("connect", "memory", "--size", "1M", "--name", "used"), exit.Busy, "--name used"},
		{"unprivileged connect", as(nobody, "connect", "memory", "--size", "1M"), exit.Permission, "root"},
		{"unprivileged disconnect", as(nobody, "disconnect", dev), exit.Permission, "root"},
		{"disconnect of no device", root("disconnect", "nbd99999"), exit.NotFound, "nbd99999"},
		{"disconnect of an idle device", root("disconnect", "nbd15"), exit.NotFound, "nbd15 is not connected"},
		{"disconnect of no name", root("disconnect", "nothing"), exit.NotFound, "nothing"},
		{"status of an idle device", root("status", "nbd15"), exit.NotFound, "nbd15 is not connected"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.name == "file without permission" {
				sh(t, "chown nobody "+in("secret.img"))
				defer sh(t, "chown root "+in("secret.img"))
			}
			r := finish(t, tt.cmd)
			if r.code != int(tt.code) {
				t.Errorf("exit code %d, want %d", r.code, tt.code)
			}
			if !strings.Contains(r.stderr, tt.says) || !strings.HasPrefix(r.stderr, "nbdctl: ") {
				t.Errorf("stderr is %q, want %q in it", r.stderr, tt.says)
			}
			if r.stdout != "" {
				t.Errorf("stdout is %q", r.stdout)
			}
			t.Log(strings.TrimSpace(r.stderr))
		})
	}
	if after := sh(t, "cd "+dir+"; sha256sum *.img; ls -l"); after != before {
		t.Errorf("the images were changed:\n%s\nwere:\n%s", after, before)
	}
	if after := must(t, "list", "--json", "--all"); after != list {
		t.Errorf("the devices were changed:\n%s\nwere:\n%s", after, list)
	}
	// Whoever may not disconnect may still look.
	r := finish(t, as(nobody, "list"))
	if r.code != 0 || !strings.Contains(r.stdout, "used.img") || !strings.Contains(r.stdout, "live") {
		t.Errorf("an unprivileged list: code %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	must(t, "disconnect", "used")
}

// TestKernelCreateUndone shows that a failed connect takes the image that it
// created away again.
func TestKernelCreateUndone(t *testing.T) {
	requireKernel(t)
	image := filepath.Join(imageDir(t), "new.img")
	// This kernel refuses such blocks, after the image was made.
	r := nbdctl(t, "connect", "file", image, "--create", "--size", "1M", "--block-size", "64k")
	if r.code != int(exit.Unsupported) || strings.Count(r.stderr, "\n") != 1 {
		t.Errorf("exit code %d: %s", r.code, r.stderr)
	}
	if _, err := os.Stat(image); !os.IsNotExist(err) {
		t.Errorf("the image is there: %v", err)
	}
}

// TestKernelModule shows what happens without the module, and that connect
// loads it.
func TestKernelModule(t *testing.T) {
	requireKernel(t)
	sh(t, "modprobe -r nbd || rmmod nbd")
	defer sh(t, "modprobe nbd")
	// As if there were no such module, neither for us nor for the kernel
	// itself, which from Linux 6.12 on asks for it by the name of the family.
	const helper = "/proc/sys/kernel/modprobe"
	was := sh(t, "cat "+helper)
	sh(t, "echo /bin/false >"+helper)
	defer sh(t, "echo "+was+" >"+helper)
	if out := must(t, "list", "--json"); strings.TrimSpace(out) != "[]" {
		t.Errorf("without the driver list prints %q", out)
	}
	absent := nbdctlCommand(t, "connect", "memory", "--size", "1M")
	absent.Env = append(absent.Env, "MODPROBE_OPTIONS=-d /nonexistent")
	r := finish(t, absent)
	if r.code != int(exit.Unsupported) || !strings.Contains(r.stderr, "no nbd driver") || !strings.Contains(r.stderr, "install") {
		t.Errorf("without the module: exit code %d, %q", r.code, r.stderr)
	}
	sh(t, "echo "+was+" >"+helper)
	client, err := nbdnl.New()
	if err == nil {
		err = client.Probe(t.Context())
		client.Close()
		sh(t, "modprobe -r nbd || rmmod nbd")
	}
	nbdnltest.Autoload.Seen(t, err == nil)
	dev := connected(t, "memory", "--size", "1M")
	must(t, "disconnect", dev)
}

// A stranger connects a device as another program would, and disconnects it
// when the test ends. It returns the device's path.
func stranger(t *testing.T) string {
	t.Helper()
	m, err := memory.New(1<<20, memory.Options{})
	if err != nil {
		t.Fatal(err)
	}
	export, err := server.NewExport(m, server.Options{})
	if err != nil {
		t.Fatal(err)
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		if ends[i], err = net.FileConn(f); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	conn := export.NewConn(ends[0], nil)
	served := make(chan error, 1)
	go func() { served <- conn.Transmit() }()
	client, err := nbdnl.New()
	if err != nil {
		t.Fatal(err)
	}
	index, err := client.Connect(t.Context(), nbdnl.Config{Sockets: []syscall.Conn{ends[1].(*net.UnixConn)}, Size: export.Size(),
		BlockSize: 512, Flags: nbdnl.Flags(export.Flags()), Timeout: 30e9, Identifier: "stranger:1"})
	if err != nil {
		t.Fatal(err)
	}
	ends[1].Close()
	ctx := context.WithoutCancel(t.Context())
	t.Cleanup(func() {
		// Where no identifiers are kept nothing but the test disconnects it.
		if st, err := client.Status(ctx, index); err == nil && st.Connected() && (st.Identifier == "stranger:1" || !st.HasIdentifier) {
			if err := client.DropAny(ctx, index); err != nil {
				t.Error(err)
			}
		}
		if err := <-served; err != nil {
			t.Error(err)
		}
		conn.Close()
		client.Close()
		m.Close()
	})
	return nbdnl.Path(index)
}

// TestKernelStrangers shows that a device of another program is listed as not
// ours and left alone, unless it is named and forced.
func TestKernelStrangers(t *testing.T) {
	requireKernel(t)
	dev := stranger(t)
	d := listed(t, dev)
	var pid, identifier any = float64(os.Getpid()), "stranger:1"
	shown := fmt.Sprint(os.Getpid())
	if !nbdnltest.Identifiers.In(t) {
		pid, identifier, shown = nil, nil, "" // Linux 5.10, which must not be asked for the owner either.
	}
	if owner := d["owner"].(map[string]any); owner["ours"] != false || owner["pid"] != pid {
		t.Errorf("the owner is %v, want not ours and pid %v", owner, pid)
	}
	if d["identifier"] != identifier || d["backend"] != nil || d["since"] != nil {
		t.Errorf("list shows %v", d)
	}
	if out := must(t, "list"); pid != nil && !strings.Contains(out, "not ours") {
		t.Errorf("list shows\n%s", out)
	}
	r := nbdctl(t, "disconnect", dev)
	if r.code != int(exit.Permission) || !strings.Contains(r.stderr, "not ours") || !strings.Contains(r.stderr, shown) {
		t.Errorf("disconnect: code %d, %q", r.code, r.stderr)
	}
	for _, all := range [][]string{{"disconnect", "--all"}, {"disconnect", "--all", "--force"}} {
		if must(t, all...); listed(t, dev) == nil {
			t.Fatalf("%v took a stranger's device", all)
		}
	}
	must(t, "disconnect", "--force", dev)
	if listed(t, dev) != nil {
		t.Error("a forced disconnect by name leaves it")
	}
}

// TestKernelQemuNBD is the same for a device that qemu-nbd connected by ioctl.
func TestKernelQemuNBD(t *testing.T) {
	requireKernel(t)
	mode, who := any("ioctl"), "qemu-nbd"
	if !nbdnltest.Identifiers.In(t) { // Such a kernel tells neither how a stranger's device was connected nor by whom.
		mode, who = nil, "another program"
	}
	image := filepath.Join(imageDir(t), "disk.img")
	sh(t, "truncate -s 1M "+image+"; qemu-nbd --fork -f raw -c /dev/nbd7 "+image)
	eventually(t, func() bool { return listed(t, "/dev/nbd7") != nil }, "nbd7 connected by qemu-nbd")
	if d := listed(t, "/dev/nbd7"); d["mode"] != mode || d["owner"].(map[string]any)["ours"] != false {
		t.Errorf("list shows %v", d)
	}
	if r := nbdctl(t, "disconnect", "nbd7"); r.code != int(exit.Permission) || !strings.Contains(r.stderr, who) {
		t.Errorf("disconnect: code %d, %q", r.code, r.stderr)
	}
	sh(t, "qemu-nbd -d /dev/nbd7 >/dev/null")
	eventually(t, func() bool { return listed(t, "/dev/nbd7") == nil }, "nbd7 free")
}

// TestKernelHeld shows that a device in use is not disconnected, and that the
// user learns by whom, for each way to use one.
func TestKernelHeld(t *testing.T) {
	for _, tt := range []struct {
		name       string
		hold, free string
		says       []string
	}{
		{"mount", "mkfs.ext4 -q $DEV; mkdir -p $TMP/mnt; mount $DEV $TMP/mnt", "umount $TMP/mnt", []string{"mount", "/mnt"}},
		{"mount in another namespace",
			"mkfs.ext4 -q $DEV; mkdir -p $TMP/mnt; setsid unshare -m --propagation private sh -c \"mount $DEV $TMP/mnt; echo \\$\\$ >$TMP/pid; exec sleep 1000\" >/dev/null 2>&1 & until test -s $TMP/pid; do sleep 0.05; done",
			"kill $(cat $TMP/pid)", []string{"mount", "/mnt", "sleep"}},
		{"opener", "setsid sleep 1000 <$DEV >/dev/null 2>&1 & echo $! >$TMP/pid", "kill $(cat $TMP/pid)", []string{"process ", "sleep"}},
		{"device mapper", "modprobe dm-mod; echo 0 2048 linear $DEV 0 | dmsetup create --noudevsync above", "dmsetup remove --noudevsync above", []string{"above"}},
		{"swap", "mkswap -q $DEV 2>/dev/null; swapon $DEV", "swapoff $DEV", []string{"swap"}},
		{"partition", "printf 'label: dos\n2048\n' | sfdisk -q --no-tell-kernel $DEV; blockdev --rereadpt $DEV; mkfs.ext4 -q ${DEV}p1; mkdir -p $TMP/mnt; mount ${DEV}p1 $TMP/mnt", "umount $TMP/mnt",
			[]string{"mount", "p1"}},
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
	if out, err := exec.Command("dd", "if="+dev, "of=/dev/null", "bs=4k", "count=1", "iflag=direct").CombinedOutput(); err == nil {
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
	eventually(t, func() bool { return len(serving(t, os.Getenv("NBDCTL_STATE_DIR"))) == 0 }, "the end of the serving process")
}
