package host

import (
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/server/blockdev"
)

// A fakeSystemd has the descriptors of a unit, as systemd does (sd_notify(3)).
type fakeSystemd struct {
	conn  *net.UnixConn
	files map[string]*os.File
	done  chan struct{}
}

func newFakeSystemd(t *testing.T) *fakeSystemd {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	f := &fakeSystemd{conn: c, files: make(map[string]*os.File), done: make(chan struct{})}
	t.Setenv("NOTIFY_SOCKET", path)
	go f.run()
	t.Cleanup(f.stop)
	return f
}

// stop ends it; afterwards its files can be looked at.
func (f *fakeSystemd) stop() {
	f.conn.Close()
	<-f.done
}

func (f *fakeSystemd) run() {
	defer close(f.done)
	text, rights := make([]byte, 4096), make([]byte, unix.CmsgSpace(4*4))
	for {
		n, m, _, _, err := f.conn.ReadMsgUnix(text, rights)
		if err != nil {
			return
		}
		var file *os.File
		if messages, err := unix.ParseSocketControlMessage(rights[:m]); err == nil && len(messages) > 0 {
			fds, _ := unix.ParseUnixRights(&messages[0])
			file = os.NewFile(uintptr(fds[0]), "sent")
		}
		set := make(map[string]string)
		for _, line := range strings.Split(string(text[:n]), "\n") {
			name, value, _ := strings.Cut(line, "=")
			set[name] = value
		}
		switch {
		case set["BARRIER"] == "1":
			closeFile(file)
		case set["FDSTOREREMOVE"] == "1":
			closeFile(f.files[set["FDNAME"]])
			delete(f.files, set["FDNAME"])
		case set["FDSTORE"] == "1" && set["FDPOLL"] == "0" && f.files[set["FDNAME"]] == nil:
			f.files[set["FDNAME"]] = file
		}
	}
}

// testEstate is one with files of these contents.
func testEstate(t *testing.T, contents ...string) *estate {
	t.Helper()
	e := &estate{Version: estateVersion, UUID: "u", Environ: []string{"A=b"}, Device: blockdev.Document{Index: 3}}
	for _, c := range contents {
		f, err := os.CreateTemp(t.TempDir(), "")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteString(c); err != nil {
			t.Fatal(err)
		}
		e.add(passBackend, f)
	}
	t.Cleanup(e.close)
	return e
}

// TestStore holds that what systemd has after two estates is the second, with every file, and that
// without one of them it is none.
func TestStore(t *testing.T) {
	systemd := newFakeSystemd(t)
	s, err := openStore()
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	second := testEstate(t, "c", "d")
	for _, e := range []*estate{testEstate(t, "a", "b", "c"), second} {
		if err := s.put(e); err != nil {
			t.Fatal(err)
		}
	}
	systemd.stop()
	if len(systemd.files) != 3 {
		t.Errorf("systemd has %d files", len(systemd.files))
	}
	for _, lacks := range []string{"1", documentName} {
		some := make(map[string]*os.File)
		for name, f := range systemd.files {
			if name != lacks {
				some[name] = f
			}
		}
		if e, err := estateOf(some); e != nil || err != nil {
			t.Errorf("without %s: %v, %v", lacks, e, err)
		}
	}
	e, err := estateOf(systemd.files)
	if err != nil || e == nil {
		t.Fatalf("%v, %v", e, err)
	}
	defer e.close()
	if e.UUID != "u" || e.Device.Index != 3 || len(e.Environ) != 1 || len(e.of(passBackend)) != 2 {
		t.Errorf("it is %+v", e)
	}
	for i, want := range []string{"c", "d"} {
		b := make([]byte, 1)
		if _, err := e.files[i].ReadAt(b, 0); err != nil || string(b) != want {
			t.Errorf("file %d has %q, %v", i, b, err)
		}
	}
}

// TestStoreUnknown holds that an estate of a later form is refused.
func TestStoreUnknown(t *testing.T) {
	e := testEstate(t)
	e.Version++
	document, err := memoryFile(e)
	if err != nil {
		t.Fatal(err)
	}
	defer document.Close()
	if e, err := estateOf(map[string]*os.File{documentName: document}); e != nil || err == nil {
		t.Errorf("%v, %v", e, err)
	}
}

// TestStoreAgain holds that what a keeper has stored that has died gives way to the estate of the
// next one.
func TestStoreAgain(t *testing.T) {
	systemd := newFakeSystemd(t)
	first, err := openStore()
	if err != nil {
		t.Fatal(err)
	}
	defer first.close()
	if err := first.put(testEstate(t, "a", "b", "c")); err != nil {
		t.Fatal(err)
	}
	t.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid()))
	t.Setenv("LISTEN_FDS", "4")
	t.Setenv("LISTEN_FDNAMES", strings.Join(first.stored, ":"))
	second, err := openStore()
	if err != nil {
		t.Fatal(err)
	}
	defer second.close()
	if err := second.put(testEstate(t, "d")); err != nil {
		t.Fatal(err)
	}
	third := second.stored
	if err := second.clear(); err != nil || len(third) != 2 {
		t.Errorf("%q, %v", third, err)
	}
	systemd.stop()
	if len(systemd.files) != 0 {
		t.Errorf("systemd still has %v", systemd.files)
	}
}

// TestStored holds that the descriptors of another process's environment are nobody's.
func TestStored(t *testing.T) {
	t.Setenv("LISTEN_PID", "1")
	t.Setenv("LISTEN_FDS", "2")
	if e, err := stored(); e != nil || err != nil {
		t.Errorf("%v, %v", e, err)
	}
}

// TestEnviron holds that what is of one unit alone is not passed on.
func TestEnviron(t *testing.T) {
	const kept = "NBDCTL_STATE_DIR"
	for _, name := range []string{"NOTIFY_SOCKET", "LISTEN_FDS", meetVariable, unitVariable, filesVariable, kept} {
		t.Setenv(name, "/x")
	}
	var passed []string
	for _, v := range environ() {
		if strings.HasSuffix(v, "=/x") {
			passed = append(passed, v)
		}
	}
	if len(passed) != 1 || passed[0] != kept+"=/x" {
		t.Errorf("passed on: %q", passed)
	}
}
