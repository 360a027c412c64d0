package inventory

import (
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// A machine has a fake kernel and a state directory.
type machine struct {
	*testing.T
	*nbdnltest.Kernel
	*Inventory
	client *nbdnl.Client
}

func newMachine(t *testing.T, o nbdnltest.Options) *machine {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbdctl-") // t.TempDir's is too long for a control socket's address
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	t.Setenv("NBDCTL_STATE_DIR", dir)
	in, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	k := nbdnltest.New(t, o)
	in.System = k.System()
	in.System.StateDir = in.Store.Dir()
	in.incarnation = func(int) nbdnl.Incarnation { return 0 }
	return &machine{T: t, Kernel: k, Inventory: in}
}

// connect connects a device.
func (m *machine) connect(index int, identifier string) {
	m.Helper()
	if m.client == nil {
		m.client = m.Client()
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		m.Fatal(err)
	}
	file := os.NewFile(uintptr(fds[0]), "kernel")
	conn, err := net.FileConn(file)
	if err != nil {
		m.Fatal(err)
	}
	m.Cleanup(func() {
		if err := errors.Join(conn.Close(), file.Close(), unix.Close(fds[1])); err != nil {
			m.Error(err)
		}
	})
	if err := m.client.ConnectIndex(m.Context(), index, nbdnl.Config{
		Sockets: []syscall.Conn{conn.(*net.UnixConn)}, Size: 1 << 20, BlockSize: 512, Timeout: 30 * time.Second,
		Identifier: identifier,
	}); err != nil {
		m.Fatal(err)
	}
}

// owner makes process 4711, which is called comm, the one that connected the device.
func (m *machine) owner(index int, comm string) {
	m.Helper()
	m.write(m.Path(filepath.Join("sys/block", filepath.Base(nbdnl.Path(index)), "pid")), "4711\n")
	m.write(m.Path("proc/4711/status"), "Name:\tserver\nTgid:\t4711\n")
	m.write(m.Path("proc/4711/comm"), comm+"\n")
}

func (m *machine) write(path, content string) {
	m.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		m.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		m.Fatal(err)
	}
}

// uuidOf is that of the record of a device.
func uuidOf(n byte) string { return "0a0a0a0a-0000-4000-8000-00000000000" + string('0'+n) }

// record is one of a live device, which change makes another.
func record(n byte, change func(*host.Record)) host.Record {
	index := int(n)
	r := host.Record{
		Version: 1, UUID: uuidOf(n), Identifier: host.IdentifierPrefix + ":" + uuidOf(n), Phase: host.PhaseLive,
		PID: 4711, Index: &index,
		Mode: "netlink", Since: time.Date(2026, 11, 23, 3, 14, 15, 0, time.UTC), Serving: 1, Size: 1 << 20,
		BlockSize: 512,
		Spec:      host.Spec{Kind: "memory", Connections: 1, Timeout: 30 * time.Second},
	}
	if change != nil {
		change(&r)
	}
	return r
}

// put writes the record of a process that lives, as long as the test, or is dead.
func (m *machine) put(r host.Record, dead bool) {
	m.Helper()
	lock := filepath.Join(m.Store.Dir(), r.UUID, "lock")
	m.write(lock, "")
	m.change(r)
	if dead {
		return
	}
	f, err := os.OpenFile(lock, os.O_RDWR, 0)
	if err != nil {
		m.Fatal(err)
	}
	m.Cleanup(func() { f.Close() })
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK}); err != nil {
		m.Fatal(err)
	}
}

// change writes a record in one step, as its process does.
func (m *machine) change(r host.Record) {
	m.Helper()
	data, err := json.Marshal(r)
	if err != nil {
		m.Fatal(err)
	}
	dir := filepath.Join(m.Store.Dir(), r.UUID)
	m.write(filepath.Join(dir, ".state.json"), string(data))
	if err := os.Rename(filepath.Join(dir, ".state.json"), filepath.Join(dir, "state.json")); err != nil {
		m.Fatal(err)
	}
}
