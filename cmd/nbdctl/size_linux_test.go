package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
)

// TestServeToTheByte holds that an export ends where its image does, be that at a part
// of a sector or at nothing, and that the last bytes can be read and written.
func TestServeToTheByte(t *testing.T) {
	image := filepath.Join(t.TempDir(), "disk.img")
	for _, tt := range []struct {
		size int
		args []string
	}{
		{0, []string{"file", image}},
		{1, []string{"file", image}},
		{511, []string{"file", image}},
		{1000, []string{"file", image}},
		{1000, []string{"file", image, "--size", "1000"}},
		{4097, []string{"file", image, "--read-only"}},
		{1<<20 + 1, []string{"file", image}},
		{1000, []string{"file", image + ".new", "--create", "--size", "1000"}},
		{1, []string{"memory", "--size", "1"}},
		{65537, []string{"memory", "--size", "65537"}},
	} {
		content := bytes.Repeat([]byte{7}, tt.size)
		if err := os.WriteFile(image, content, 0o600); err != nil {
			t.Fatal(err)
		}
		cmd, uri, stderr := serveFor(t, append(tt.args, "--listen", "tcp:127.0.0.1:0")...)
		c := dial(t, uri)
		if c.size != int64(tt.size) {
			t.Errorf("%v: the export has %d bytes, want %d", tt.args, c.size, tt.size)
		}
		n := min(tt.size, 3)
		off := int64(tt.size - n)
		if n > 0 && tt.args[len(tt.args)-1] != "--read-only" {
			content = append(content[:off], "end"[:n]...)
			if _, errno, err := c.do(1, off, n, content[off:]); errno != 0 || err != nil {
				t.Errorf("%v: write of %d bytes at %d: %d, %v", tt.args, n, off, errno, err)
			}
			if got, errno, err := c.do(0, off, n, nil); errno != 0 || err != nil || !bytes.Equal(got, content[off:]) {
				t.Errorf("%v: read of %d bytes at %d: %q, %d, %v", tt.args, n, off, got, errno, err)
			}
		}
		if _, errno, err := c.do(0, off, n+1, nil); errno != 22 || err != nil { // EINVAL
			t.Errorf("%v: a read past the end: %d, %v", tt.args, errno, err)
		}
		c.nc.Close()
		ends(t, cmd, 15)
		if strings.Contains(stderr.String(), "warning") {
			t.Errorf("%v: %s", tt.args, stderr)
		}
		if tt.args[1] == image {
			if got, err := os.ReadFile(image); err != nil || !bytes.Equal(got, content) {
				t.Errorf("%v: the image has %d bytes, want %d; %v", tt.args, len(got), tt.size, err)
			}
		}
	}
}

// TestServeBlocks holds that with a block size an export ends at its last whole block,
// with a warning, and that there must be one.
func TestServeBlocks(t *testing.T) {
	image := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(image, make([]byte, 5000), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd, uri, stderr := serveFor(t, "file", image, "--block-size", "4k", "--listen", "tcp:127.0.0.1:0")
	if c := dial(t, uri); c.size != 4096 {
		t.Errorf("the export has %d bytes", c.size)
	}
	ends(t, cmd, 15)
	if !strings.Contains(stderr.String(), "its last 904 bytes are not part of the export") {
		t.Errorf("stderr says %q", stderr)
	}
	for _, size := range []int{0, 1000} {
		if err := os.Truncate(image, int64(size)); err != nil {
			t.Fatal(err)
		}
		r := nbdctl(t, "serve", "file", image, "--block-size", "4k", "--listen", "tcp:127.0.0.1:0")
		if r.code != int(exit.Failure) || r.stdout != "" {
			t.Errorf("an image of %s bytes: exit code %d, %s%s", strconv.Itoa(size), r.code, r.stdout, r.stderr)
		}
	}
}
