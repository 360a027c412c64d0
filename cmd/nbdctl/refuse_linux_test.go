package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
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
	sh(t, "cd "+dir+"; truncate -s 1M used.img odd.img locked.img secret.img; chmod 0 secret.img")
	sh(t, "cd "+dir+"; truncate -s 1000 small.img; mkfifo fifo")
	in := func(name string) string { return filepath.Join(dir, name) }
	dev := connected(t, "file", in("used.img"), "--name", "used")
	before := sh(t, "cd "+dir+"; sha256sum *.img; ls -l")
	list := must(t, "list", "--json", "--all")

	// likeOthers takes away what lets root open files that are not his.
	const likeOthers = "--bounding-set -dac_override,-dac_read_search --inh-caps -dac_override,-dac_read_search"
	as := func(user, line string) *exec.Cmd { return commandAs(t, user, strings.Fields(line)...) }
	root := func(line string) *exec.Cmd { return nbdctlCommand(t, strings.Fields(line)...) }
	for _, tt := range []struct {
		name string
		cmd  *exec.Cmd
		code exit.Code
		says string
	}{
		{
			"taken device", root("connect memory --size 1M --device " + dev),
			exit.Busy, filepath.Base(dev) + " is connected already, by pid ",
		},
		{"impossible device", root("connect memory --size 1M --device nbd99999999"), exit.Usage, "99999999"},
		{"size zero", root("connect memory --size 0"), exit.Usage, "--size 0"},
		{"size no multiple", root("connect memory --size 1000"), exit.Usage, "multiple of the block size 512"},
		{"wrong block size", root("connect memory --size 1M --block-size 1000"), exit.Usage, "--block-size 1000"},
		{"unknown backend", root("connect floppy"), exit.Usage, `"floppy"`},
		{"missing file", root("connect file " + in("missing.img")), exit.Failure, "missing.img"},
		{"directory", root("connect file " + dir), exit.Failure, "directory"},
		{"fifo", root("connect file " + in("fifo")), exit.Failure, "fifo"},
		{
			"file too small for a block", root("connect file " + in("small.img") + " --block-size 1024"),
			exit.Failure, "small.img",
		},
		{"other size than asked", root("connect file " + in("odd.img") + " --size 2M"), exit.Usage, "odd.img"},
		{
			"create would change the size", root("connect file " + in("odd.img") + " --size 2M --create"),
			exit.Usage, "odd.img",
		},
		{
			"create in a missing directory", root("connect file " + in("no/disk.img") + " --size 2M --create"),
			exit.Failure, "no/disk.img",
		},
		{
			"file without permission", as(likeOthers, "connect file "+in("secret.img")),
			exit.Permission, "secret.img",
		},
		{"attached image", root("connect file " + in("used.img")), exit.Busy, "pid "},
		{"attached image, read-only", root("connect file " + in("used.img") + " --read-only"), exit.Busy, "pid "},
		{"name in use", root("connect memory --size 1M --name used"), exit.Busy, "--name used"},
		{"unprivileged connect", as(nobody, "connect memory --size 1M"), exit.Permission, "root"},
		{"unprivileged disconnect", as(nobody, "disconnect "+dev), exit.Permission, "root"},
		{"disconnect of no device", root("disconnect nbd99999"), exit.NotFound, "nbd99999"},
		{"disconnect of an idle device", root("disconnect nbd15"), exit.NotFound, "nbd15 is not connected"},
		{"disconnect of no name", root("disconnect nothing"), exit.NotFound, "nothing"},
		{"status of an idle device", root("status nbd15"), exit.NotFound, "nbd15 is not connected"},
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
	if r.code != 0 || !containsAll(r.stdout, "used.img", "live") {
		t.Errorf("an unprivileged list: code %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	must(t, "disconnect", "used")
}

// TestKernelCreateUndone shows that a failed connect takes the image that it
// created away again.
func TestKernelCreateUndone(t *testing.T) {
	requireKernel(t)
	nbdnltest.LargeBlocks.Lack(t)
	image := filepath.Join(imageDir(t), "new.img")
	// This kernel refuses such blocks, after the image was made.
	r := nbdctl(t, "connect", "file", image, "--create", "--size", "1M", "--block-size", "64k")
	if r.code != int(exit.Unsupported) || strings.Count(r.stderr, "\n") != 1 || !strings.Contains(r.stderr, "65536") {
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
	if !r.ended(exit.Unsupported, "no nbd driver", "install") {
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
