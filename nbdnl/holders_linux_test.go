package nbdnl_test

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/holder"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

func TestHolders(t *testing.T) {
	k := nbdnltest.New(t, nbdnltest.Options{})
	write := func(path, content string) {
		t.Helper()
		path = k.Path(path)
		err := errors.Join(
			os.MkdirAll(filepath.Dir(path), 0o755),
			os.WriteFile(path, []byte(content), 0o644),
		)
		if err != nil {
			t.Fatal(err)
		}
	}
	holders := func() []string {
		t.Helper()
		found, err := k.System().Holders().Find(t.Context(), 3)
		if err != nil {
			t.Fatal(err)
		}
		var s []string
		for _, h := range found {
			s = append(s, h.String())
		}
		return s
	}
	if got := holders(); len(got) != 0 {
		t.Fatalf("holders of an unused device: %v", got)
	}
	k.Partition(3, 2)
	write("sys/block/nbd3/nbd3p2/holders/dm-0", "")
	write("sys/block/dm-0/dm/name", "vg-lv\n")
	write("sys/block/nbd3/holders/md5", "")
	write("sys/block/loop7/loop/backing_file", "/dev/nbd3\n")
	write("sys/block/loop8/loop/backing_file", "/srv/nbd3\n")
	write("proc/swaps", "Filename Type Size Used Priority\n"+
		"/dev/nbd3p2                    partition\t4\t0\t-2\n"+
		"/swap\\040file file 1 0 -3\n")
	k.Mount(3, "/mnt/own")
	// Another mount namespace, which shares one mount and has one of its own, of a file system that
	// shows a device number of its own.
	write("proc/900/comm", "systemd-nspawn\n")
	write("proc/900/mountinfo", "1 1 43:96 / /mnt/own rw - ext4 /dev/nbd3 rw\n"+
		"2 1 0:77 / /srv rw - btrfs /dev/nbd3p2 rw\n3 1 0:78 / /x rw - tmpfs /dev/nbd4 rw\n")
	err := errors.Join(
		os.Mkdir(k.Path("proc/900/ns"), 0o755),
		os.Symlink("mnt:[2]", k.Path("proc/900/ns/mnt")),
	)
	if err != nil {
		t.Fatal(err)
	}
	k.Hold(3)
	k.Hold(4)
	want := []string{
		"device md5 on nbd3",
		"device vg-lv on nbd3p2",
		"device loop7 on nbd3",
		"mount of nbd3 at /mnt/own",
		"mount of nbd3p2 at /srv (seen by process 900, systemd-nspawn)",
		"swap on nbd3p2",
		"process 4001 (holder) with nbd3 open",
	}
	if diff := cmp.Diff(want, holders()); diff != "" {
		t.Errorf("holders (-want +got):\n%s", diff)
	}
	if _, err := k.System().Holders().Find(t.Context(), 99); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("holders of no device: %v", err)
	}
	busy := &nbdnl.BusyError{Index: 3, Holders: make([]holder.Holder, 6)}
	if got := busy.Error(); !strings.HasSuffix(got, " and 2 more") {
		t.Errorf("message is %q", got)
	}
}

// The descriptor that keeps a device connected by ioctls is no holder for the client whose it is,
// also where the kernel does not tell who that is; any other descriptor of the same process is one.
func TestHoldersOwn(t *testing.T) {
	k := nbdnltest.New(t, nbdnltest.Options{Release: "5.10.0"})
	system := k.System()
	system.Mode = nbdnl.ModeIoctl
	w := world{T: t, Client: newClient(t, system)}
	index := w.connect(unserved(t))
	dir := k.Path(filepath.Join("proc", strconv.Itoa(os.Getpid())))
	open := func(fd string) {
		t.Helper()
		err := errors.Join(
			os.MkdirAll(filepath.Join(dir, "fd"), 0o755),
			os.MkdirAll(filepath.Join(dir, "fdinfo"), 0o755),
			os.WriteFile(filepath.Join(dir, "fdinfo", fd), []byte("flags:\t0100000\n"), 0o644),
			os.Symlink(k.Path(nbdnl.Path(index)), filepath.Join(dir, "fd", fd)),
		)
		if err != nil {
			t.Fatal(err)
		}
	}
	count := func(name string, f *holder.Finder, want int) {
		t.Helper()
		found, err := f.Find(t.Context(), index)
		if err != nil || len(found) != want {
			t.Errorf("%s finds %v, %v, want %d", name, found, err, want)
		}
	}
	open("5")
	count("the client", w.Holders(), 0)
	count("another client", newClient(t, system).Holders(), 1)
	count("the system", system.Holders(), 1)
	open("6")
	count("the client, with the device open once more", w.Holders(), 1)
}
