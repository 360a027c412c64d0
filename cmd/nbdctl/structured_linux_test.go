package main

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// A piece is a part of an export as nbdinfo and qemu-img tell of it.
type piece struct {
	Offset, Start, Length int64
	Type                  int64 // of nbdinfo
	Zero, Data            bool  // of qemu-img
}

// exported serves something until the test ends, and returns the URI.
func exported(t *testing.T, args ...string) string {
	t.Helper()
	socket := filepath.Join(shortDir(t), "s")
	cmd := nbdctlCommand(t, append([]string{"serve", "--listen", "unix:" + socket}, args...)...)
	uri := started(t, cmd)
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // killed
	})
	return uri
}

// TestServeHoles serves an image with holes: the field's clients find them, and copy the data
// alone.
func TestServeHoles(t *testing.T) {
	tools(t, "nbdinfo", "nbdcopy", "qemu-img", "qemu-io")
	const mib = 1 << 20
	dir := shortDir(t)
	image := filepath.Join(dir, "image")
	data := make([]byte, 3*mib)
	rand.Read(data)
	f, err := os.Create(image)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(data, 5*mib); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(64 * mib); err != nil {
		t.Fatal(err)
	}
	uri := exported(t, "--read-only", "file", image)

	pieces := func(name string, args ...string) (all []piece) {
		t.Helper()
		r := finish(t, command(t, name, args...))
		if err := json.Unmarshal([]byte(r.stdout), &all); r.code != 0 || err != nil {
			t.Fatalf("%s: %d, %v, %s%s", name, r.code, err, r.stdout, r.stderr)
		}
		return all
	}
	want := []piece{
		{Length: 5 * mib, Type: 3},
		{Offset: 5 * mib, Length: 3 * mib},
		{Offset: 8 * mib, Length: 56 * mib, Type: 3},
	}
	if diff := cmp.Diff(want, pieces("nbdinfo", "--map", "--json", uri)); diff != "" {
		t.Errorf("nbdinfo --map (-want +got):\n%s", diff)
	}
	for i := range want {
		p := &want[i]
		p.Start, p.Zero, p.Data, p.Type = p.Offset, p.Type == 3, p.Type == 0, 0
	}
	if diff := cmp.Diff(want, pieces("qemu-img", "map", "--output", "json", uri)); diff != "" {
		t.Errorf("qemu-img map (-want +got):\n%s", diff)
	}

	whole, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	for _, copies := range [][]string{
		{"nbdcopy", "--connections=4", uri},
		{"nbdcopy", "--no-extents", uri},
		{"qemu-img", "convert", "-O", "raw", uri},
	} {
		to := filepath.Join(dir, "copy")
		if r := finish(t, command(t, copies[0], append(copies[1:], to)...)); r.code != 0 {
			t.Errorf("%v: %d, %s", copies, r.code, r.stderr)
		}
		if got, err := os.ReadFile(to); err != nil || !bytes.Equal(got, whole) {
			t.Errorf("%v: %v, or other bytes", copies, err)
		}
		os.Remove(to)
	}
	// Across the border of data and hole.
	r := finish(t, command(t, "qemu-io", "-r", "-f", "raw", uri, "-c", "read -P 0 8388608 1M", "-c", "read -P 0 0 5M"))
	if r.code != 0 || bytes.Contains([]byte(r.stdout), []byte("failed")) {
		t.Errorf("qemu-io: %d, %s%s", r.code, r.stdout, r.stderr)
	}
}

// TestServeOdd serves an image that does not end with a sector. QEMU reads whole sectors: it would
// wait for the rest of the last one, had the server no structured replies (block/nbd.c,
// nbd_co_do_receive_one_chunk).
func TestServeOdd(t *testing.T) {
	tools(t, "qemu-img")
	dir := shortDir(t)
	image, to := filepath.Join(dir, "image"), filepath.Join(dir, "copy")
	data := make([]byte, 4096+1000)
	rand.Read(data)
	if err := os.WriteFile(image, data, 0o600); err != nil {
		t.Fatal(err)
	}
	uri := exported(t, "--read-only", "file", image)
	if r := finish(t, command(t, "qemu-img", "convert", "-O", "raw", uri, to)); r.code != 0 {
		t.Fatalf("qemu-img convert: %d, %s", r.code, r.stderr)
	}
	want := append(data, make([]byte, 24)...) // to the end of the sector
	if got, err := os.ReadFile(to); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%v, or other bytes", err)
	}
}
