package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/backends/nbd"
	"github.com/nbdctl/nbdctl/testdata/certs"
)

// TestServeUpgrade upgrades a server again and again while clients of all its exports write and
// read: those without TLS keep their connections, those with it connect anew, and no byte is wrong.
func TestServeUpgrade(t *testing.T) {
	tools(t, "nbdinfo", "nbdcopy")
	dir := shortDir(t)
	certificates := t.TempDir()
	certs.New(t).Write(t, certificates)
	sh(t, "cd "+dir+"; mkdir images; truncate -s 16M disk.img images/a.img; head -c 64M /dev/urandom >copied.img")
	file, control := filepath.Join(dir, "exports.json"), filepath.Join(dir, "ctl")
	definitions := `{"version": 1, "default": "disk", "exports": [
		{"name": "disk", "kind": "file", "arg": "disk.img", "description": "the first"},
		{"name": "copied", "kind": "file", "arg": "copied.img", "read_only": true},
		{"name": "scratch", "kind": "memory", "size": "16M"}
	], "folders": [{"path": "images", "prefix": "images/"}]}`
	if err := os.WriteFile(file, []byte(definitions), 0o600); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "s")
	first, uri, stderr := servedFor(t, "--exports", file, "--listen", "tcp:127.0.0.1:0", "--listen", "unix:"+socket,
		"--control", control, "--tls", "allow", "--tls-certificates", certificates)
	endAll(t, file)
	tcp := strings.TrimSuffix(uri, "disk") // nbd://127.0.0.1:PORT/
	unix := func(name string) string { return "nbd+unix:///" + name + "?socket=" + socket }
	over := strings.Replace(strings.Replace(tcp, "nbd://", "nbds://", 1), "127.0.0.1", "localhost", 1)

	reconnect := &nbd.Reconnect{MinPause: time.Millisecond}
	var loads []*clientLoad
	for i, c := range []struct {
		uri string
		o   nbd.Options
	}{
		{tcp + "disk", nbd.Options{}},
		{unix("disk"), nbd.Options{Connections: 4}},
		{tcp + "scratch", nbd.Options{NoExtended: true}},
		{unix("scratch"), nbd.Options{NoStructured: true}},
		{tcp + "images/a.img", nbd.Options{}},
		{over + "scratch?tls-certificates=" + certificates, nbd.Options{Reconnect: reconnect}},
		{over + "disk?tls-certificates=" + certificates, nbd.Options{Reconnect: reconnect, Connections: 2}},
	} {
		loads = append(loads, loadClient(t, c.uri, c.o, int64(i)<<20))
	}
	copied := filepath.Join(dir, "copy")
	pid := first.Process.Pid
	written := 0.0
	for round := range upgrades() {
		copying := begin(t, command(t, "sh", "-c", "nbdcopy '"+unix("copied")+"' "+copied))
		for _, l := range loads {
			l.goesOn(t)
		}
		out := must(t, "upgrade", "--server", control)
		number := strings.TrimSuffix(strings.TrimPrefix(out, "server at "+control+" upgraded: pid "), " serves\n")
		next, err := strconv.Atoi(number)
		if err != nil || next == pid {
			t.Fatalf("upgrade prints %q, and before it was pid %d", out, pid)
		}
		pid = next
		for _, l := range loads {
			l.goesOn(t)
		}
		if r := <-copying; r.code != 0 {
			t.Errorf("nbdcopy: %s", r.stderr)
		}
		sh(t, "cmp "+copied+" "+filepath.Join(dir, "copied.img")+"; rm "+copied)
		if got := listedAt(t, unix("")); len(got) != 4 || got[0] != `copied 67108864 "" true` {
			t.Errorf("round %d: the exports are %q", round, got)
		}
		now := servedBy(t, control, "scratch")
		if now <= written {
			t.Errorf("round %d: %v bytes were written to scratch, and %v before", round, now, written)
		}
		written = now
		if all := processes(t, file); len(all) != 2 {
			t.Errorf("round %d: the processes are %v", round, all)
		}
	}
	for _, l := range loads {
		l.stop(t)
	}
	log := stderr.String()
	if strings.Count(log, `msg="taken over"`) != upgrades() || strings.Contains(log, "level=ERROR") {
		t.Errorf("the log is:\n%s", log)
	}
	// What whoever has started it tells the first process, the last one does.
	if err := first.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	stderr.await(t, "what=exports")
	if err := first.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := first.Wait(); err != nil {
		t.Errorf("the server: %v", err)
	}
	if all := processes(t, file); len(all) != 0 {
		t.Errorf("left are %v", all)
	}
	for _, path := range []string{socket, control} {
		if _, err := os.Lstat(path); !os.IsNotExist(err) {
			t.Errorf("%s is left: %v", path, err)
		}
	}
}

// processes returns those that have that argument.
func processes(t *testing.T, argument string) (pids []int) {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range all {
		if line, _ := os.ReadFile(path); bytes.Contains(line, []byte(argument+"\x00")) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			pids = append(pids, pid)
		}
	}
	return pids
}

// endAll kills all that have that argument when the test ends, for they outlive the one that it has
// started.
func endAll(t *testing.T, argument string) {
	t.Helper()
	t.Cleanup(func() {
		for _, pid := range processes(t, argument) {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	})
}

// servedBy returns how many bytes the export has been written, as stats tells.
func servedBy(t *testing.T, control, name string) float64 {
	t.Helper()
	var all []struct {
		Total struct{ Write struct{ Bytes float64 } }
	}
	out := must(t, "stats", "--json", "--server", control, name)
	if err := json.Unmarshal([]byte(out), &all); err != nil || len(all) != 1 {
		t.Fatalf("stats of %q: %v, %v", name, all, err)
	}
	return all[0].Total.Write.Bytes
}

// A clientLoad is a client that writes and reads what it has written, until it is told to stop.
type clientLoad struct {
	client *nbd.Client
	rounds atomic.Int64
	end    chan struct{}
	ended  chan error
}

// loadClient has a client use a MiB from off on.
func loadClient(t *testing.T, uri string, o nbd.Options, off int64) *clientLoad {
	t.Helper()
	c, err := nbd.Dial(t.Context(), uri, o)
	if err != nil {
		t.Fatalf("%s: %v", uri, err)
	}
	l := &clientLoad{client: c, end: make(chan struct{}), ended: make(chan error, 1)}
	go func() {
		err := l.run(off)
		if err != nil {
			err = fmt.Errorf("%s: %w", uri, err)
		}
		l.ended <- err
	}()
	return l
}

func (l *clientLoad) run(off int64) error {
	p, back := make([]byte, 100_000), make([]byte, 100_000)
	for n := int64(1); ; n++ {
		select {
		case <-l.end:
			return l.client.Close()
		default:
		}
		at := off + n%9*100_000
		for i := 0; i+8 <= len(p); i += 8 {
			binary.BigEndian.PutUint64(p[i:], uint64(n)<<32|uint64(i))
		}
		if _, err := l.client.WriteAt(p, at); err != nil {
			return err
		}
		if _, err := l.client.ReadAt(back, at); err != nil {
			return err
		}
		if !bytes.Equal(p, back) {
			return fmt.Errorf("round %d: other bytes at %d", n, at)
		}
		if n%16 == 0 {
			if err := l.client.Sync(); err != nil {
				return err
			}
		}
		l.rounds.Store(n)
	}
}

// goesOn waits until it has done some more.
func (l *clientLoad) goesOn(t *testing.T) {
	t.Helper()
	before := l.rounds.Load()
	eventually(t, func() bool {
		select {
		case err := <-l.ended:
			l.ended <- err
			return true
		default:
			return l.rounds.Load() >= before+10
		}
	}, "a client to go on")
}

func (l *clientLoad) stop(t *testing.T) {
	t.Helper()
	close(l.end)
	if err := <-l.ended; err != nil {
		t.Errorf("a client: %v", err)
	}
}
