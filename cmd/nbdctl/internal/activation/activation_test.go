package activation

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// TestMain is also a process that was started with sockets: it says what it has got.
func TestMain(m *testing.M) {
	if os.Getenv("ACTIVATION_TEST") == "" {
		os.Exit(m.Run())
	}
	if os.Getenv("LISTEN_PID") == "own" {
		os.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid()))
	}
	all, err := Listeners()
	if err != nil {
		fmt.Println("error:", err)
	}
	for _, l := range all {
		fmt.Println(l.Addr().Network(), l.Addr())
		l.Close()
	}
	if _, there := os.LookupEnv("LISTEN_FDS"); there {
		fmt.Println("LISTEN_FDS is there")
	}
}

// TestListeners starts a process with sockets as systemd does.
func TestListeners(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	unix, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close()
	tcp, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	sockets := []interface{ File() (*os.File, error) }{unix, tcp}
	both := fmt.Sprintf("unix %s\ntcp %s\n", path, tcp.Addr())
	for _, tt := range []struct{ pid, fds, want string }{
		{"own", "2", both},
		{"1", "2", "LISTEN_FDS is there\n"}, // They are for somebody else.
		{"own", "0", ""},
		{"own", "x", "error: socket activation: LISTEN_FDS=\"x\" is no number of sockets\n"},
		{"own", "9", "error: socket activation: descriptor 5: "},
	} {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "ACTIVATION_TEST=1",
			"LISTEN_PID="+tt.pid, "LISTEN_FDS="+tt.fds, "LISTEN_FDNAMES=a:b")
		for _, s := range sockets {
			f, err := s.File()
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			cmd.ExtraFiles = append(cmd.ExtraFiles, f)
		}
		out, err := cmd.CombinedOutput()
		got := string(out)
		failed := strings.HasPrefix(tt.want, "error") && strings.HasPrefix(got, tt.want)
		if err != nil || got != tt.want && !failed {
			t.Errorf("LISTEN_PID=%s LISTEN_FDS=%s: %v, %q, want %q", tt.pid, tt.fds, err, got, tt.want)
		}
	}
	if _, err := os.Stat(path); err != nil {
		t.Errorf("the socket's file, which is not the process's own: %v", err)
	}
}
