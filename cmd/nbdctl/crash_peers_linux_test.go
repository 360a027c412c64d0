//go:build survive

package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A contender makes an image a device, and has things happen to it. What somebody who watches over
// processes would do about that is done at once: a server that ended is started again.
type contender struct {
	name    string
	t       *testing.T
	image   string
	dev     string
	connect func(*contender)
	crash   func(*contender) // kills the process that serves
	upgrade func(*contender) // replaces it by another version, in order
	other   func(*contender) // kills the other process that there is; nil: there is none
	end     func(*contender)

	server, client *exec.Cmd
	dir            string
}

// crashTimeout is how long a request may take, wherever that can be said.
const crashTimeout = 5

// peerDevice is that of the peers.
const peerDevice = "/dev/nbd7"

func contenders() []contender {
	return []contender{
		{
			name: "nbdctl",
			connect: func(c *contender) {
				c.dev = connected(c.t, "file", c.image, "--timeout", fmt.Sprintf("%ds", crashTimeout))
			},
			crash:   func(c *contender) { kill(c.t, c.dev, syscall.SIGKILL) },
			upgrade: func(c *contender) { must(c.t, "upgrade", c.dev) },
			other: func(c *contender) {
				if err := syscall.Kill(keeperOf(c.t, c.dev), syscall.SIGKILL); err != nil {
					c.t.Error(err)
				}
			},
			end: func(c *contender) { nbdctl(c.t, "disconnect", "--force", c.dev) },
		},
		nbdClient("nbd-client + nbd-server"),
		nbdClient("nbd-client -persist -L -n + nbd-server", "-persist", "-L", "-n"),
		{
			name: "qemu-nbd -c",
			connect: func(c *contender) {
				c.dev = peerDevice
				c.begin(&c.server, "qemu-nbd", "-v", "-f", "raw", "-c", c.dev, c.image)
			},
			crash:   func(c *contender) { c.again(syscall.SIGKILL) },
			upgrade: func(c *contender) { c.again(syscall.SIGTERM) },
			end: func(c *contender) {
				finish(c.t, command(c.t, "qemu-nbd", "-d", c.dev))
				c.stop(&c.server, syscall.SIGKILL)
			},
		},
	}
}

func nbdClient(name string, how ...string) contender {
	serve := func(c *contender) {
		c.begin(&c.server, "nbd-server", "-d", "-C", filepath.Join(c.dir, "config"))
		listens := func() bool { _, err := os.Stat(filepath.Join(c.dir, "s")); return err == nil }
		eventually(c.t, listens, "nbd-server")
	}
	again := func(c *contender, s syscall.Signal) {
		c.stop(&c.server, s)
		_ = os.Remove(filepath.Join(c.dir, "s"))
		serve(c)
	}
	c := contender{
		name: name,
		connect: func(c *contender) {
			c.dir, c.dev = shortDir(c.t), peerDevice
			config := fmt.Sprintf("[generic]\nunixsock=%s/s\nlistenaddr=127.0.0.1\n"+
				"[disk]\nexportname=%s\nflush=true\nfua=true\n", c.dir, c.image)
			if err := os.WriteFile(filepath.Join(c.dir, "config"), []byte(config), 0o600); err != nil {
				c.t.Fatal(err)
			}
			serve(c)
			args := append(how, "-u", filepath.Join(c.dir, "s"), "-N", "disk", "-timeout", fmt.Sprint(crashTimeout))
			c.begin(&c.client, "nbd-client", append(args, c.dev)...)
		},
		crash:   func(c *contender) { again(c, syscall.SIGKILL) },
		upgrade: func(c *contender) { again(c, syscall.SIGTERM) },
		end: func(c *contender) {
			finish(c.t, command(c.t, "nbd-client", "-d", c.dev))
			c.stop(&c.client, syscall.SIGKILL)
			c.stop(&c.server, syscall.SIGKILL)
		},
	}
	if len(how) > 0 {
		c.other = func(c *contender) { c.stop(&c.client, syscall.SIGKILL) }
	}
	return c
}

// begin starts a process, with those that it will start, in a group of its own.
func (c *contender) begin(cmd **exec.Cmd, name string, args ...string) {
	c.t.Helper()
	*cmd = exec.Command(name, args...)
	said := new(lockedBuffer)
	(*cmd).Stdout, (*cmd).Stderr = said, said
	(*cmd).SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := (*cmd).Start(); err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { c.t.Logf("%s %s: %s", c.name, name, said) })
}

// stop sends a signal to the processes of a group, and waits until the first of them has ended.
func (c *contender) stop(cmd **exec.Cmd, s syscall.Signal) {
	if *cmd == nil {
		return
	}
	_ = syscall.Kill(-(*cmd).Process.Pid, s) // It may have ended.
	ended := make(chan struct{})
	go func() {
		_ = (*cmd).Wait() // ended by the signal
		close(ended)
	}()
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		_ = syscall.Kill(-(*cmd).Process.Pid, syscall.SIGKILL)
		<-ended
	}
	*cmd = nil
}

// again ends a qemu-nbd, and starts it once more.
func (c *contender) again(s syscall.Signal) {
	c.stop(&c.server, s)
	c.begin(&c.server, "qemu-nbd", "-v", "-f", "raw", "-c", c.dev, c.image)
}

// TestKernelCompareCrash has the same happen to a mounted device of nbdctl, of nbd-client and of
// qemu-nbd, and prints what becomes of each: make compare-crash. Nothing of the others is ours, so
// only nbdctl may lose nothing.
func TestKernelCompareCrash(t *testing.T) {
	requireKernel(t, ".*")
	var release unix.Utsname
	if err := unix.Uname(&release); err != nil {
		t.Fatal(err)
	}
	table := []string{
		"Linux " + unix.ByteSliceToString(release.Release[:]) + ", " + time.Now().Format(time.DateOnly),
		"",
		"| what happens | to | the load | it stands still | a new read after | device | " +
			"file system | lost: written, synced |",
		"|---|---|---|---|---|---|---|---|",
	}
	for _, tt := range []struct {
		name   string
		loaded bool
		event  func(contender) func(*contender)
	}{
		{"server killed under load", true, func(c contender) func(*contender) { return c.crash }},
		{"server killed, idle", false, func(c contender) func(*contender) { return c.crash }},
		{"server replaced under load", true, func(c contender) func(*contender) { return c.upgrade }},
		{"the other process killed", true, func(c contender) func(*contender) { return c.other }},
	} {
		for _, c := range contenders() {
			event := tt.event(c)
			if event == nil {
				table = append(table, fmt.Sprintf("| %s | %s | there is none | | | | | |", tt.name, c.name))
				continue
			}
			t.Run(tt.name+", "+c.name, func(t *testing.T) {
				c.t = t
				row := fmt.Sprintf("| %s | %s | %s |", tt.name, c.name, c.compare(event, tt.loaded))
				t.Log(row)
				table = append(table, row)
			})
		}
	}
	fmt.Println(strings.Join(table, "\n"))
}

// compare has an event happen to a device with a file system, and returns what becomes of both.
func (c *contender) compare(event func(*contender), loaded bool) string {
	t := c.t
	c.image = filepath.Join(imageDir(t), "disk.img")
	mnt := t.TempDir()
	sh(t, "truncate -s 64M "+c.image+"; mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 "+c.image)
	c.connect(c)
	ready := func() bool { return readDirect(c.dev) == nil }
	eventually(t, ready, "the device")
	sh(t, "mount "+c.dev+" "+mnt)
	load := newCrashLoad(mnt)
	if loaded {
		<-time.After(2 * time.Second)
	} else { // one file is there, and nothing is under way
		<-time.After(time.Second)
		close(load.stop)
		<-load.done
		sh(t, "sync -f "+mnt)
	}
	load.event()
	event(c)
	load.after()
	const patience = 10 * time.Second
	deadline := time.Now().Add(patience)
	read := firstRead(c.dev, patience)
	said := "idle"
	if loaded {
		for !load.going() && time.Now().Before(deadline) {
			<-time.After(20 * time.Millisecond)
		}
		<-time.After(time.Second)
		close(load.stop)
		if said = ""; !load.awaitEnd(t, 5*time.Second) {
			said = "hangs; "
		}
	}
	device := "as before"
	if err := readDirect(c.dev); err != nil {
		device = fmt.Sprintf("a read: %v", err)
	}
	unmount := begin(t, command(t, "sh", "-c", "timeout 5 umount "+mnt))
	select {
	case r := <-unmount:
		if r.code != 0 {
			device += ", umount fails"
		}
	case <-time.After(10 * time.Second):
		device += ", umount hangs"
	}
	_ = unix.Unmount(mnt, unix.MNT_DETACH) // where it is still mounted
	c.end(c)
	<-load.done
	if loaded {
		said += load.errors()
	}
	eventually(t, func() bool { return listed(t, c.dev) == nil }, "the end of %s", c.dev)
	system, written, synced := c.left(load)
	if c.name == "nbdctl" && (written+synced > 0 || load.failed > 0 || system != "clean") {
		t.Errorf("nbdctl: %s; %s; lost %d, %d", said, system, written, synced)
	}
	waited := ""
	if loaded {
		waited = "for good"
		if load.going() {
			waited = fmt.Sprintf("%.2f s", load.longest.Seconds())
		}
	}
	first := "never"
	if read > 0 {
		first = fmt.Sprintf("%.2f s", read.Seconds())
	}
	return fmt.Sprintf("%s | %s | %s | %s | %s | %d, %d KiB", said, waited, first, device, system,
		written>>10, synced>>10)
}

// left says what is the matter with the file system of the image when the device has gone, and how
// many bytes it lacks of those that the load has written, and synced.
func (c *contender) left(load *crashLoad) (system string, written, synced int) {
	t, mnt := c.t, c.t.TempDir()
	head := finish(t, command(t, "sh", "-c", "dumpe2fs -h "+c.image+" 2>/dev/null"))
	system = "clean"
	if strings.Contains(head.stdout, "needs_recovery") {
		system = "journal to be replayed"
	}
	if err := mountImage(c.image, mnt, "ext4"); err != nil {
		return fmt.Sprint(err), 0, 0
	}
	written, synced = load.lost(mnt)
	if err := unix.Unmount(mnt, 0); err != nil {
		t.Error(err)
	}
	check := finish(t, command(t, "e2fsck", "-fn", c.image))
	if check.code != 0 || strings.Contains(head.stdout, "with errors") {
		system += ", with errors"
	}
	return system, written, synced
}
