package devices_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/nbdctl/nbdctl/nbdnl/internal/devices"
	"github.com/nbdctl/nbdctl/nbdnl/machine"
)

// tree makes a machine of files.
func tree(t *testing.T, files map[string]string) machine.Root {
	t.Helper()
	root := machine.Root(t.TempDir())
	for name, content := range files {
		path := root.Path(name)
		err := errors.Join(
			os.MkdirAll(filepath.Dir(path), 0o755),
			os.WriteFile(path, []byte(content), 0o644),
		)
		if err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// TestUse holds what is read of a connected device, and what of that each kernel is not asked for
// or does not tell.
func TestUse(t *testing.T) {
	tests := []struct {
		release     string
		backend     bool
		tid         int
		identified  bool
		identifiers bool
	}{
		{"5.10.0", false, 0, false, false},
		{"5.14.0", true, 0, true, true},
		{"6.1.0", true, 77, true, true},
		{"6.1.0", false, 77, false, true},
		{"unknown", false, 0, false, false},
	}
	for _, tt := range tests {
		files := map[string]string{
			"proc/sys/kernel/osrelease": tt.release + "\n",
			"sys/block/nbd3/pid":        "77\n",
			"sys/block/nbd4/size":       "8\n",
		}
		if tt.backend {
			files["sys/block/nbd3/backend"] = "test:1\n"
		}
		d := devices.New(tree(t, files))
		u, err := d.Use(3)
		if err != nil {
			t.Fatal(err)
		}
		want := devices.Use{
			Connected:   true,
			Incarnation: d.Incarnation(3),
			TID:         tt.tid,
			Identified:  tt.identified,
		}
		if tt.identified {
			want.Identifier = "test:1"
		}
		if u != want || u.Incarnation == 0 || d.Identifiers != tt.identifiers {
			t.Errorf("%+v: use %+v, identifiers %t", tt, u, d.Identifiers)
		}
		if again, err := d.Use(3); again != u || err != nil {
			t.Errorf("%+v: the same use is %+v and %+v, %v", tt, u, again, err)
		}
		if u, err := d.Use(4); u != (devices.Use{}) || err != nil || d.Incarnation(4) != 0 {
			t.Errorf("%+v: not connected: %+v, %v", tt, u, err)
		}
		if _, err := d.Use(5); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%+v: no device: %v", tt, err)
		}
	}
}

// TestTree holds which devices there are, and how large.
func TestTree(t *testing.T) {
	d := devices.New(tree(t, map[string]string{
		"sys/block/nbd10/size": "8\n", "sys/block/nbd2/size": "18446744073709551615\n", "sys/block/sda/size": "1\n",
		"sys/block/nbd2/nbd2p1/size": "1\n", "sys/block/nbd2/ro": "x\n",
	}))
	if got, err := d.Indexes(); !slices.Equal(got, []int{2, 10}) || err != nil {
		t.Errorf("there are %v, %v", got, err)
	}
	if got, err := d.Partitions(2); !slices.Equal(got, []string{"nbd2p1"}) || err != nil {
		t.Errorf("partitions %v, %v", got, err)
	}
	if got, err := d.Size(10); got != 4096 || err != nil {
		t.Errorf("size %d, %v", got, err)
	}
	if got, err := d.Size(2); got < 0 || err != nil {
		t.Errorf("size of what has more than there can be: %d, %v", got, err)
	}
	if got, err := d.Number(10, "ro"); got != 0 || err != nil {
		t.Errorf("a missing number: %d, %v", got, err)
	}
	if _, err := d.Number(2, "ro"); err == nil {
		t.Error("a number that is none was read")
	}
	if err := errors.Join(d.Visible(), d.Exists(2)); err != nil {
		t.Error(err)
	}
}
