package main

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// run runs a command of QEMU's.
func run(t *testing.T, argv ...string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), argv[0], argv[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", argv, err, out)
	}
}

// qemu serves an image with a dirty bitmap, and returns its socket, and what a backup of the bitmap
// is: some of the image was written before it began, and some afterwards.
func qemu(t *testing.T) (socket string, want []byte) {
	t.Helper()
	for _, name := range []string{"qemu-img", "qemu-io", "qemu-nbd"} {
		if _, err := exec.LookPath(name); err != nil {
			if os.Getenv("NBD_TEST_REQUIRE") == "1" {
				t.Fatal(err)
			}
			t.Skip(err)
		}
	}
	dir, err := os.MkdirTemp("", "nbd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	image, socket := filepath.Join(dir, "disk.qcow2"), filepath.Join(dir, "s")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", image, "64M")
	run(t, "qemu-io", "-c", "write -P 1 0 4M", image)
	run(t, "qemu-img", "bitmap", "--add", image, "b0")
	run(t, "qemu-io", "-c", "write -P 2 1M 64k", "-c", "write -P 3 60M 3M", image)
	want = make([]byte, 64<<20)
	copy(want[1<<20:], bytes.Repeat([]byte{2}, 64<<10))
	copy(want[60<<20:], bytes.Repeat([]byte{3}, 3<<20))

	server := exec.CommandContext(t.Context(), "qemu-nbd", "-r", "-t", "-x", "disk", "-k", socket, "-B", "b0", image)
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		server.Process.Kill()
		server.Wait()
	})
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); <-tick.C {
		if nc, err := net.Dial("unix", socket); err == nil {
			nc.Close()
			return socket, want
		}
	}
	t.Fatal("qemu-nbd does not listen")
	return "", nil
}

// check makes a backup, which must have what has changed, and nothing else.
func check(t *testing.T, server string, want []byte) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "backup")
	if err := backup(t.Context(), server, "qemu:dirty-bitmap:b0", path); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%s: %v, or the backup has other bytes than what has changed", server, err)
	}
}

func TestBackup(t *testing.T) {
	socket, want := qemu(t)
	check(t, "nbd+unix:///disk?socket="+socket, want)
	path := filepath.Join(t.TempDir(), "backup")
	if err := backup(t.Context(), "nbd+unix:///disk?socket="+socket, "qemu:dirty-bitmap:no", path); err == nil {
		t.Error("a bitmap that is not there has a backup")
	}
}

// TestBackupHTTP has the export behind an HTTP server, which passes bytes on.
func TestBackupHTTP(t *testing.T) {
	socket, want := qemu(t)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != "nbd" || r.URL.Path != "/disk" {
			http.NotFound(w, r)
			return
		}
		nc, buffered, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer nc.Close()
		back, err := net.Dial("unix", socket)
		if err != nil {
			t.Error(err)
			return
		}
		defer back.Close()
		io.WriteString(nc, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: nbd\r\n\r\n")
		go func() {
			io.Copy(back, buffered)
			back.Close()
		}()
		io.Copy(nc, back)
	}))
	defer s.Close()
	check(t, s.URL+"/disk", want)
	path := filepath.Join(t.TempDir(), "backup")
	if err := backup(context.Background(), s.URL+"/no", "qemu:dirty-bitmap:b0", path); err == nil {
		t.Error("what is no NBD server has a backup")
	}
}
