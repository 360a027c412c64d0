//go:build interop

package main

import (
	"os"
	"path/filepath"
	"regexp"
	"testing"
	"time"
)

// TestInteropIotests runs the tests of QEMU's block layer that can do with a raw image behind NBD,
// unmodified: with qemu-nbd, and with nbdctl in its place. Each that passes with the one passes
// with the other.
func TestInteropIotests(t *testing.T) {
	dir := os.Getenv("NBD_TEST_IOTESTS")
	if dir == "" {
		t.Fatal("NBD_TEST_IOTESTS does not say where they are; use make interop")
	}
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	qemu := iotests(t, dir, "/usr/bin/qemu-nbd", root)
	ours := iotests(t, dir, filepath.Join(root, "testdata/lab/as-qemu-nbd"), root)
	passed := 0
	for name, result := range qemu {
		switch {
		case result == "not run":
		case result != "pass":
			t.Logf("%s: %s with qemu-nbd, %s with nbdctl", name, result, ours[name])
		case ours[name] == "pass":
			passed++
		case ofQemuNBD[name] != "":
			t.Logf("%s: %s with nbdctl: %s", name, ours[name], ofQemuNBD[name])
		default:
			t.Errorf("%s: %s, and passes with qemu-nbd", name, ours[name])
		}
	}
	if passed < 20 {
		t.Errorf("only %d tests passed", passed)
	}
	t.Logf("%d tests passed with both", passed)
}

// ofQemuNBD are tests of what qemu-nbd does and no protocol says.
var ofQemuNBD = map[string]string{
	"241": "it wants an image of 1000 bytes served as 1024, and a warning of qemu-nbd about its format",
}

var iotestLine = regexp.MustCompile(`[\r\n]([0-9]{3}|tests/[\w-]+) +(pass|fail|not run)`)

// iotests returns what became of each test with that program as qemu-nbd.
func iotests(t *testing.T, dir, qemuNBD, root string) map[string]string {
	t.Helper()
	scratch := shortDir(t)
	cmd := commandFor(t, 10*time.Minute, "/usr/bin/python3", "./check", "-raw", "-nbd")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(),
		"PATH="+root+"/.bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"TEST_DIR="+scratch+"/test", "SOCK_DIR="+scratch+"/sock",
		"QEMU_PROG=/usr/bin/qemu-system-x86_64", "QEMU_IMG_PROG=/usr/bin/qemu-img", "QEMU_IO_PROG=/usr/bin/qemu-io",
		"QSD_PROG=/usr/bin/qemu-storage-daemon", "QEMU_NBD_PROG="+qemuNBD)
	for _, d := range []string{"test", "sock"} {
		if err := os.Mkdir(filepath.Join(scratch, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	r := finish(t, cmd) // Some fail with everybody.
	results := make(map[string]string)
	for _, m := range iotestLine.FindAllStringSubmatch(r.stdout, -1) {
		results[m[1]] = m[2]
	}
	if len(results) == 0 {
		t.Fatalf("no results: %d, %s%s", r.code, r.stdout, r.stderr)
	}
	return results
}
