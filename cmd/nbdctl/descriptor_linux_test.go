package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
)

// TestDescriptorAt holds which paths are a descriptor, also by way of a link.
func TestDescriptorAt(t *testing.T) {
	dir := t.TempDir()
	link := func(name, to string) string {
		if err := os.Symlink(to, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
		return filepath.Join(dir, name)
	}
	link("down", "../"+filepath.Base(dir)+"/up")
	for path, want := range map[string]int{
		"/dev/stdin":                 0,
		"/dev/stderr":                2,
		"/dev/fd/7":                  7,
		"/proc/self/fd/0":            0,
		"/proc/thread-self/fd/12":    12,
		link("direct", "/dev/stdin"): 0,
		link("up", "/dev/fd/63"):     63,
		link("over", "down"):         63,
		link("loop", "loop"):         -1,
		link("plain", "disk.img"):    -1,
		"/dev/null":                  -1,
		"/dev/fd":                    -1,
		"/dev/fd/":                   -1,
		"/dev/fd/x":                  -1,
		"/dev/fd/-1":                 -1,
		"/proc/self/fd/7/x":          -1,
		"/nothing":                   -1,
	} {
		if got := descriptorAt(path); got != want {
			t.Errorf("%s: %d, want %d", path, got, want)
		}
	}
}

// descriptors are the ways to pass an image to a command: how it is opened in a shell, and typed.
var descriptors = []struct{ redirection, path string }{
	{"<>$image", "/dev/stdin"},
	{"<>$image", "/dev/fd/0"},
	{"<>$image", "/proc/self/fd/0"},
	{"3<>$image", "/dev/fd/3"},
	{"5<>$image", "/dev/fd/5"},
	{"6<>$image", "/dev/fd/6"},
	{"9<>$image", "/proc/self/fd/9"},
	{"4<>$image 9</dev/null", "$PWD/link"},
}

// TestServeDescriptor holds that an image can be a descriptor, and not one that nbdctl
// has opened or prints to.
func TestServeDescriptor(t *testing.T) {
	for i, tt := range descriptors {
		dir := shortDir(t)
		sh(t, "cd "+dir+"; truncate -s 1M disk.img; ln -s /dev/fd/4 link")
		path := strings.ReplaceAll(tt.path, "$PWD", dir)
		serve := nbdctlCommand(t, "serve", "file", path, "--listen", "tcp:127.0.0.1:0")
		cmd := inShell(serve, `image=disk.img; exec "$@" `+tt.redirection)
		cmd.Dir = dir
		c := dial(t, started(t, cmd))
		if _, errno, err := c.do(1, 512, 4, []byte("data")); c.size != 1<<20 || errno != 0 || err != nil {
			t.Errorf("%d, %s: %d bytes, write: %d, %v", i, path, c.size, errno, err)
		}
		ends(t, cmd, 15)
		b, err := os.ReadFile(filepath.Join(dir, "disk.img"))
		if err != nil || !bytes.Equal(b[512:516], []byte("data")) {
			t.Errorf("%d, %s: the image has %q, %v", i, path, b[512:516], err)
		}
	}
	for _, tt := range []struct {
		path string
		code exit.Code
		says string
	}{
		{"/dev/stdout", exit.Usage, "/dev/stdout is where serve prints to"},
		{"/dev/fd/2", exit.Usage, "/dev/fd/2 is where serve prints to"},
		{"/dev/fd/3", exit.Failure, "/dev/fd/3: nbdctl was started without a descriptor 3"},
		{"/dev/fd/5", exit.Failure, "without a descriptor 5"},
		{"/proc/self/fd/700", exit.Failure, "without a descriptor 700"},
		{"/dev/stdin", exit.Failure, "/dev/stdin"}, // a pipe
	} {
		serve := nbdctlCommand(t, "serve", "file", tt.path, "--listen", "tcp:127.0.0.1:0")
		cmd := inShell(serve, `: | exec "$@" 3<&- 5<&-`)
		if r := finish(t, cmd); !r.ended(tt.code, tt.says) || r.stdout != "" {
			t.Errorf("%s: exit code %d, %s", tt.path, r.code, r.stderr)
		}
	}
}

// TestKernelDescriptor holds the same of a device, whose process in the background has
// other descriptors; and that it keeps none of its user's.
func TestKernelDescriptor(t *testing.T) {
	requireKernel(t)
	if err := os.Symlink("/proc/self/fd/0", "/dev/stdin"); err == nil { // udev makes it, and the lab has none
		defer os.Remove("/dev/stdin")
	}
	dir := imageDir(t)
	sh(t, "cd "+dir+"; ln -s /dev/fd/4 link")
	for i, tt := range descriptors {
		sh(t, "cd "+dir+"; rm -f disk.img; truncate -s 1M disk.img")
		path := strings.ReplaceAll(tt.path, "$PWD", dir)
		cmd := inShell(nbdctlCommand(t, "connect", "file", path), "image=disk.img; exec \"$@\" "+tt.redirection)
		cmd.Dir = dir
		r := finish(t, cmd)
		if r.code != 0 {
			t.Errorf("%d, %s: exit code %d, %s", i, path, r.code, r.stderr)
			continue
		}
		dev := strings.TrimSpace(r.stdout)
		d := listed(t, dev)
		if d["backend"] != "file "+path {
			t.Errorf("%d: list shows %q, want what was typed, %s", i, d["backend"], path)
		}
		// Once for the device; what was inherited is closed.
		proc := fmt.Sprintf("/proc/%.0f/fd", d["owner"].(map[string]any)["pid"])
		if n := sh(t, "ls -l "+proc+" | grep -c disk.img"); n != "1" {
			t.Errorf("%d, %s: the serving process has the image open %s times", i, path, n)
		}
		sh(t, "printf data | dd of="+dev+" bs=512 seek=1 conv=sync oflag=direct status=none")
		must(t, "disconnect", dev)
		if got := sh(t, "dd if="+dir+"/disk.img bs=512 skip=1 count=1 status=none | head -c 4"); got != "data" {
			t.Errorf("%d, %s: the image has %q", i, path, got)
		}
	}
	for path, says := range map[string]string{
		"/dev/fd/7":  "without a descriptor 7",
		"/dev/fd/63": "without a descriptor 63",
		"/dev/stdin": "/dev/stdin", // a pipe
	} {
		r := finish(t, inShell(nbdctlCommand(t, "connect", "file", path), `: | exec "$@"`))
		if r.code != int(exit.Failure) || !strings.Contains(r.stderr, says) {
			t.Errorf("%s: exit code %d, %s", path, r.code, r.stderr)
		}
	}
	sh(t, "cd "+dir+"; truncate -s 1M disk.img")
	cmd := nbdctlCommand(t, "connect", "file", "/proc/self/cwd/disk.img")
	cmd.Dir = dir
	dev := strings.TrimSpace(finish(t, cmd).stdout)
	if d := listed(t, dev); d == nil || d["backend"] != "file "+dir+"/disk.img" {
		t.Errorf("list shows %v", d)
	}
	must(t, "disconnect", dev)
}
