package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/inventory"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// shown makes a machine with a device in each state that list tells apart, and returns what there
// is to print of them.
func shown(t *testing.T) []inventory.View {
	t.Helper()
	local := time.Local
	time.Local = time.UTC
	t.Cleanup(func() { time.Local = local })
	dir := t.TempDir()
	t.Setenv("NBDCTL_STATE_DIR", dir)
	k := nbdnltest.New(t, nbdnltest.Options{Devices: 9})
	client := k.Client()
	connect := func(index int, identifier string, flags nbdnl.Flags) {
		t.Helper()
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		file := os.NewFile(uintptr(fds[0]), "kernel")
		conn, err := net.FileConn(file)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close(); file.Close(); unix.Close(fds[1]) })
		if err := client.ConnectIndex(t.Context(), index, nbdnl.Config{
			Sockets: []syscall.Conn{conn.(*net.UnixConn)}, Size: int64(index+1) << 20, BlockSize: 512,
			Flags: flags, Timeout: 30 * time.Second, Identifier: identifier,
		}); err != nil {
			t.Fatal(err)
		}
	}
	write := func(name, content string) {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	locked := func(name string) {
		t.Helper()
		f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK}); err != nil {
			t.Fatal(err)
		}
	}
	uuid := func(index int) string { return fmt.Sprintf("0a0a0a0a-0000-4000-8000-%012d", index) }
	record := func(index int, alive bool, phase, mode, more string) {
		t.Helper()
		write(filepath.Join(uuid(index), "lock"), "")
		write(filepath.Join(uuid(index), "state.json"), fmt.Sprintf(`{"version": 1,
			"uuid": %q, "identifier": "nbdctl:%[1]s", "phase": %q, "pid": %d, "index": %d, "mode": %q,
			"since": "2026-11-23T03:14:15Z", "size": %d, "block_size": 512, "log": "/run/nbdctl/%[1]s/log", %[7]s}`,
			uuid(index), phase, os.Getpid(), index, mode, int64(index+1)<<20, more))
		if alive {
			locked(filepath.Join(uuid(index), "lock"))
		}
	}
	connect(0, "nbdctl:"+uuid(0), nbdnl.FlagSendFlush|nbdnl.FlagSendFUA|nbdnl.FlagSendTrim|nbdnl.FlagSendWriteZeroes)
	record(0, true, "live", "netlink", `"serving": 1,
		"spec": {"label": "build", "kind": "file", "arg": "/root/a\nb & c.img", "connections": 1,
			"timeout": 30000000000, "dead_timeout": 120000000000, "restart": 5},
		"loss": {"time": "2026-11-23T04:05:06Z", "error": "write at 0, 512 bytes: no space left on device"},
		"restarts": 2, "undisturbed": 1`)
	write(filepath.Join(uuid(0), "keeper"), `{"pid": 814}`)
	locked(filepath.Join(uuid(0), "keeper"))
	connect(1, "nbdctl:"+uuid(1), nbdnl.FlagSendFlush)
	record(1, false, "live", "netlink", `"serving": 1, "identity": "inode 2 of device 8:1",
		"spec": {"kind": "file", "arg": "/srv/poison.img", "connections": 1, "timeout": 30000000000,
			"dead_timeout": 60000000000, "restart": 5},
		"gave_up": {"time": "2026-11-23T04:05:06Z",
			"reason": "the process that serves it has died 6 times within 10m"}`)
	connect(2, "other:2", 0)
	write("leases/nbd2", "other:2\n")
	_, release := k.Hold(4)
	t.Cleanup(release)
	k.ConnectIoctl(5, 6<<20)
	record(5, true, "live", "ioctl",
		`"serving": 2, "spec": {"kind": "memory", "ioctl": true, "connections": 2,
			"timeout": 60000000000, "dead_timeout": 0}`)
	connect(6, "nbdctl:"+uuid(6), 0)
	connect(7, "nbdctl:"+uuid(7), nbdnl.FlagReadOnly)
	record(7, true, "degraded", "netlink", `"serving": 1,
		"spec": {"kind": "file", "arg": "/srv/golden.img", "read_only": true, "connections": 2,
			"timeout": 90000000000, "dead_timeout": 7000000000}`)
	connect(9, "nbdctl:"+uuid(9), nbdnl.FlagSendFlush)
	record(9, true, "waiting", "netlink", `"serving": 2,
		"spec": {"kind": "nbd", "arg": "nbds://example.com/disk", "connections": 2,
			"timeout": 30000000000, "dead_timeout": 60000000000},
		"remote": {"way": "relay", "replies": "extended", "tls": true, "connections": 2, "connections_alive": 0,
			"block_size": 32768, "lost_since": "2026-11-23T04:05:06Z", "replaced": 3,
			"error": "dial tcp 192.0.2.1:10809: connection refused"}`)
	connect(8, "other:8", nbdnl.FlagSendFlush)
	return viewsOf(t, k)
}

// viewsOf are the views of all devices of a machine.
func viewsOf(t *testing.T, k *nbdnltest.Kernel) (views []inventory.View) {
	t.Helper()
	in, err := inventory.Open()
	if err != nil {
		t.Fatal(err)
	}
	in.System = k.System()
	in.System.StateDir = in.Store.Dir()
	devices, _, err := in.All(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range devices {
		views = append(views, d.View())
	}
	return views
}

// TestOutput holds what list, status and watch print, for people and as JSON, of a device in each
// state.
func TestOutput(t *testing.T) {
	views := shown(t)
	at := time.Date(2026, 11, 23, 5, 6, 7, 8e6, time.UTC)
	for name, print := range map[string]func(*bytes.Buffer) error{
		"list.json":  func(b *bytes.Buffer) error { return printJSON(b, views) },
		"list.text":  func(b *bytes.Buffer) error { return printTable(b, views) },
		"watch.json": func(b *bytes.Buffer) error { return printEvents(b, at, views, true) },
		"watch.text": func(b *bytes.Buffer) error { return printEvents(b, at, views, false) },
		"status.json": func(b *bytes.Buffer) error {
			return printEach(views, func(v *inventory.Full) error { return printJSON(b, v) })
		},
		"status.text": func(b *bytes.Buffer) error {
			return printEach(views, func(v *inventory.Full) error { return printStatus(b, v) })
		},
	} {
		t.Run(name, func(t *testing.T) {
			var b bytes.Buffer
			if err := print(&b); err != nil {
				t.Fatal(err)
			}
			want, err := os.ReadFile(filepath.Join("testdata", name))
			if err != nil {
				t.Fatal(err)
			}
			got := strings.ReplaceAll(b.String(), strconv.Itoa(os.Getpid()), "4711")
			// The width of a column depends on the number.
			if diff := cmp.Diff(unaligned(string(want)), unaligned(got)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
	var list []map[string]any
	data, err := json.Marshal(views)
	if err == nil {
		err = json.Unmarshal(data, &list)
	}
	if err != nil || len(list) != 10 {
		t.Errorf("%d devices, %v", len(list), err)
	}
}

// unaligned has one space in the place of several.
func unaligned(s string) string {
	for strings.Contains(s, "   ") {
		s = strings.ReplaceAll(s, "   ", "  ")
	}
	return s
}

func printEvents(b *bytes.Buffer, at time.Time, views []inventory.View, asJSON bool) error {
	print := printEvent(b, asJSON)
	for _, v := range views {
		if err := print(inventory.Event{Time: at, Event: "state", View: v}); err != nil {
			return err
		}
	}
	return nil
}

// printEach prints the connected devices as status shows them, the first with all that a process
// can tell.
func printEach(views []inventory.View, print func(*inventory.Full) error) error {
	for i, v := range views {
		if v.Size == 0 {
			continue
		}
		full := &inventory.Full{View: v, Holders: []string{}}
		if i == 0 {
			log := "/run/nbdctl/log"
			full.Log = &log
			full.Holders = []string{"mount of nbd0 at /mnt"}
			full.Traffic = []host.Traffic{{Read: host.OpTraffic{Requests: 7, Bytes: 4096},
				Write: host.OpTraffic{Requests: 1, Errors: 1}, InFlight: 2}, {}}
			full.LastError = &host.Failure{Op: "write", Offset: 512, Length: 1024, Error: "boom",
				Time: time.Date(2026, 11, 23, 4, 5, 6, 0, time.UTC)}
		}
		if err := print(full); err != nil {
			return err
		}
	}
	return nil
}
