package doctor

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nbdctl/nbdctl/nbdnl"
)

// TestReadBack shows that it is noticed when what is read is not what was
// written, or less.
func TestReadBack(t *testing.T) {
	path := filepath.Join(t.TempDir(), "device")
	want := bytes.Repeat([]byte("nbdctl doctor. "), 1<<12)
	const at = 1 << 16
	content := append(make([]byte, at), want...)
	try := func() error {
		t.Helper()
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		return readBack(path, at, want)
	}
	if err := try(); err != nil {
		t.Error(err)
	}
	content[len(content)-1]++
	if err := try(); err == nil || !strings.Contains(err.Error(), "is not what is read") {
		t.Errorf("with another last byte: %v", err)
	}
	content = content[:len(content)-4096]
	if err := try(); err == nil {
		t.Error("nothing is said of one that is too short")
	}
}

// TestFeaturesBlocks shows that no size of blocks is told that was not tried.
func TestFeaturesBlocks(t *testing.T) {
	st := nbdnl.Status{Flags: nbdnl.FlagSendFlush, HasIdentifier: true}
	for block, want := range map[int]string{
		0:       "flush, several connections, identifiers",
		4096:    "flush, several connections, blocks of 512 to 4096 bytes, identifiers",
		1 << 16: "flush, several connections, blocks of 512 to 65536 bytes, identifiers",
	} {
		if f := featuresOf(st, nbdnl.FlagSendFlush, block); f.Seen != want || f.Result != OK {
			t.Errorf("blocks of %d: %v, want %s", block, f, want)
		}
	}
}
