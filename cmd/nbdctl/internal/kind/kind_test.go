package kind

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/nbdctl/nbdctl/backends/file"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
)

// TestCheck holds what is refused before anything is touched, and what the user
// is told to do.
func TestCheck(t *testing.T) {
	tests := []struct {
		spec host.Spec
		says string // empty: it is fine
	}{
		{host.Spec{}, "memory, file"},
		{host.Spec{Kind: "tape"}, `unknown backend "tape"`},
		{host.Spec{Kind: "memory", Size: 1 << 20}, ""},
		{host.Spec{Kind: "memory"}, "--size 512M"},
		{host.Spec{Kind: "memory", Size: 1 << 20, Arg: "x"}, `no argument, got "x"`},
		{host.Spec{Kind: "memory", Size: 1 << 20, Create: true}, "leave it out"},
		{host.Spec{Kind: "memory", Size: 1 << 20, Options: []string{"limit=4G"}}, ""},
		{host.Spec{Kind: "memory", Size: 1 << 20, Options: []string{"limit=0"}}, "above zero"},
		{host.Spec{Kind: "memory", Size: 1 << 20, Options: []string{"limit"}}, "must be key=value"},
		{host.Spec{Kind: "memory", Size: 1 << 20, Options: []string{"direct=on"}}, "only limit"},
		{host.Spec{Kind: "file", Arg: "disk.img"}, ""},
		{host.Spec{Kind: "file"}, "nbdctl connect file disk.img"},
		{host.Spec{Kind: "file", Arg: "disk.img", Create: true}, "--create needs --size"},
		{host.Spec{Kind: "file", Arg: "disk.img", Create: true, Size: 1 << 20, ReadOnly: true}, "exclude each other"},
		{host.Spec{Kind: "file", Arg: "disk.img", Options: []string{"direct=on"}}, ""},
		{host.Spec{Kind: "file", Arg: "disk.img", Options: []string{"direct=on", "direct=maybe"}}, "must be on or off"},
		{host.Spec{Kind: "file", Arg: "disk.img", Options: []string{"lock=off"}}, ""},
		{host.Spec{Kind: "file", Arg: "disk.img", Options: []string{"lock=no"}}, "-o lock=no: must be on or off"},
		{host.Spec{Kind: "nbd", Arg: "nbd://example.com/disk", Size: 1 << 20, Options: []string{"await=on"}}, ""},
		{host.Spec{Kind: "nbd", Arg: "disk.img"}, "its scheme must be one of"},
		{host.Spec{Kind: "nbd"}, "its scheme must be one of"},
		{host.Spec{Kind: "nbd", Arg: "nbd://example.com/disk", Create: true}, "made by its server"},
		{host.Spec{Kind: "nbd", Arg: "nbd://example.com/disk", Options: []string{"await=yes"}}, "must be on or off"},
	}
	for _, tt := range tests {
		err := Check(tt.spec)
		switch {
		case tt.says == "" && err != nil:
			t.Errorf("%+v: %v", tt.spec, err)
		case tt.says != "" && (exit.Of(err) != exit.Usage || !strings.Contains(err.Error(), tt.says)):
			t.Errorf("%+v: code %d, %v, want a usage error with %q", tt.spec, exit.Of(err), err, tt.says)
		}
	}
}

// TestOpenFile holds that an image that was made for a device goes when the device
// does not come into being, and that one that was there stays.
func TestOpenFile(t *testing.T) {
	spec := host.Spec{Kind: "file", Arg: filepath.Join(t.TempDir(), "disk.img"), Size: 1 << 20}
	_, err := Open(t.Context(), spec)
	if !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "--create --size") {
		t.Errorf("without an image: %v, want advice how to make it", err)
	}
	spec.Create = true
	b, err := Open(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Discard(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(spec.Arg); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a discarded image: %v, want it gone", err)
	}

	// An odd end, which is no part of the device, is told of.
	if err := os.WriteFile(spec.Arg, make([]byte, 1<<20+7), 0o600); err != nil {
		t.Fatal(err)
	}
	b, err = Open(t.Context(), host.Spec{Kind: "file", Arg: spec.Arg})
	if err != nil {
		t.Fatal(err)
	}
	if b.Discard != nil || len(b.Warnings) != 1 || !strings.Contains(b.Warnings[0], "last 7 bytes") {
		t.Errorf("an image that was there: discarded %t, warnings %q", b.Discard != nil, b.Warnings)
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
}

// TestAdviseFile holds what the user is told to do about an image that can't be opened as
// it is.
func TestAdviseFile(t *testing.T) {
	readOnly := &file.ReadOnlyError{Path: "disk.img", Reason: "the block device is read-only", Err: syscall.EROFS}
	noLocks := &file.NoLocksError{Path: "disk.img", Err: syscall.ENOLCK}
	created := host.Spec{Create: true, Size: 1 << 20}
	for _, tt := range []struct {
		spec host.Spec
		err  error
		says string
	}{
		{host.Spec{}, readOnly, "file: disk.img: it can't be written: the block device is read-only; use --read-only"},
		{created, readOnly, "; use --read-only, without --create"},
		{host.Spec{}, noLocks, "; -o lock=off does without, where nobody else uses it"},
		{created, fmt.Errorf("file: disk.img: %w", syscall.EROFS), "file: disk.img: read-only file system"},
	} {
		err := adviseFile(tt.spec, tt.err)
		if !strings.HasSuffix(err.Error(), tt.says) || !errors.Is(err, tt.err) {
			t.Errorf("%q, want it to end in %q", err, tt.says)
		}
	}
}
