package machine_test

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/nbdnl/machine"
)

// files makes a machine of files and, where the content begins with "->", links.
func files(t *testing.T, content map[string]string) machine.Root {
	t.Helper()
	root := machine.Root(t.TempDir())
	for _, name := range slices.Sorted(maps.Keys(content)) {
		path, value := root.Path(name), content[name]
		err := os.MkdirAll(filepath.Dir(path), 0o755)
		if err == nil && value[:2] == "->" {
			err = os.Symlink(value[2:], path)
		} else if err == nil {
			err = os.WriteFile(path, []byte(value), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestRelease(t *testing.T) {
	for name, want := range map[string][3]int{
		"6.1.0-31-amd64":         {6, 1, 0},
		"5.10.223":               {5, 10, 223},
		"5.10.223-cloud":         {5, 10, 223},
		"6.12.107+deb13-amd64":   {6, 12, 107},
		"6.18.44-fc-v782":        {6, 18, 44},
		"7.2-rc1":                {7, 2, 0},
		"6":                      {6, 0, 0},
		"6.":                     {6, 0, 0},
		"6.1.":                   {6, 1, 0},
		"":                       {},
		"x.y":                    {},
		"next":                   {},
		"six.one":                {},
		".1":                     {},
		"99999999999999999999.1": {},
	} {
		want := machine.Release{Name: name, Major: want[0], Minor: want[1], Patch: want[2]}
		if got := machine.ParseRelease(name); got != want || got.Known() != (want.Major != 0) {
			t.Errorf("%q is %+v, known %t, want %+v", name, got, got.Known(), want)
		}
	}
	root := files(t, map[string]string{"proc/sys/kernel/osrelease": "6.1.0-31-amd64\n"})
	if got, want := root.Release(), (machine.Release{Name: "6.1.0-31-amd64", Major: 6, Minor: 1}); got != want {
		t.Errorf("read %+v, want %+v", got, want)
	}
	if got := machine.Root(t.TempDir()).Release(); got != (machine.Release{}) || !got.Before(0, 0, 1) {
		t.Errorf("without a file %+v", got)
	}
}

func TestReleaseBefore(t *testing.T) {
	tests := []struct {
		name                string
		major, minor, patch int
		want                bool
	}{
		{"6.12.0", 6, 2, 0, false},
		{"6.1.9", 6, 1, 10, true},
		{"6.1.0", 6, 1, 0, false},
		{"5.19.0", 6, 0, 0, true},
		{"next", 2, 6, 0, true},
	}
	for _, tt := range tests {
		if got := machine.ParseRelease(tt.name).Before(tt.major, tt.minor, tt.patch); got != tt.want {
			t.Errorf("%s before %d.%d.%d: %t", tt.name, tt.major, tt.minor, tt.patch, got)
		}
	}
}

func TestParseMount(t *testing.T) {
	tests := []struct {
		in   string
		want machine.Mount
		ok   bool
	}{
		{`36 35 43:96 / /mnt rw - ext4 /dev/nbd3 rw`,
			machine.Mount{ID: 36, Number: "43:96", Point: "/mnt", Type: "ext4", Source: "/dev/nbd3"}, true},
		{`36 35 43:96 /sub /a\040b\134c rw shared:1 master:2 - ext4 /dev/nbd3 rw`,
			machine.Mount{ID: 36, Number: "43:96", Point: `/a b\c`, Type: "ext4", Source: "/dev/nbd3"}, true},
		{`36 35 43:96 / /odd\9\04 rw - ext4 s rw`,
			machine.Mount{ID: 36, Number: "43:96", Point: `/odd\9\04`, Type: "ext4", Source: "s"}, true},
		{`7 35 0:40 / /tab\011and\043 rw - btrfs /dev/mapper/a\012b rw`,
			machine.Mount{ID: 7, Number: "0:40", Point: "/tab\tand#", Type: "btrfs", Source: "/dev/mapper/a\nb"}, true},
		{`x 35 43:96 / /mnt rw - ext4 /dev/nbd3 rw`, machine.Mount{}, false},
		{`36 35 43:96 / /mnt - ext4 /dev/nbd3 rw`, machine.Mount{}, false},
		{`36 35 43:96 / /mnt rw shared:1`, machine.Mount{}, false},
		{`36 35 43:96 / /mnt rw - ext4`, machine.Mount{}, false},
		{``, machine.Mount{}, false},
	}
	for _, tt := range tests {
		got, ok := machine.ParseMount(tt.in)
		if ok != tt.ok || got != tt.want {
			t.Errorf("%q is %+v, %t, want %+v, %t", tt.in, got, ok, tt.want, tt.ok)
		}
	}
}

func FuzzParseMount(f *testing.F) {
	f.Add(`36 35 43:96 /sub /mnt/a\040b rw,noatime shared:1 master:2 - ext4 /dev/nbd3 rw,errors=continue`)
	f.Add(`36 35 0:96 / / rw - btrfs /dev/nbd3 rw`)
	f.Fuzz(func(t *testing.T, line string) {
		m, ok := machine.ParseMount(line)
		if len(m.Point)+len(m.Source)+len(m.Number)+len(m.Type) > len(line) {
			t.Errorf("%+v of %q", m, line)
		}
		if ok && (m.Number == "" || m.Point == "" || m.Source == "" || m.Type == "") {
			t.Errorf("%+v of %q", m, line)
		}
	})
}

// TestMounts holds that each mount namespace is looked at once, and this process's first.
func TestMounts(t *testing.T) {
	root := files(t, map[string]string{
		"proc/sys/kernel/osrelease": "6.1.0\n",

		"proc/self/ns/mnt":    "->mnt:[1]",
		"proc/self/mountinfo": "1 0 8:1 / / rw - ext4 /dev/sda1 rw\nnonsense\n",
		"proc/9/ns/mnt":       "->mnt:[2]",
		"proc/9/mountinfo":    "2 0 8:1 / /a rw - ext4 /dev/sda1 rw\n3 0 0:5 / /b rw - tmpfs none rw\n",
		"proc/10/ns/mnt":      "->mnt:[1]",
		"proc/10/mountinfo":   "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n",
		"proc/11/ns/mnt":      "->mnt:[2]",
		"proc/12/ns/mnt":      "->mnt:[3]",
	})
	want := []machine.Mount{
		{ID: 1, Number: "8:1", Point: "/", Type: "ext4", Source: "/dev/sda1"},
		{PID: 9, ID: 2, Number: "8:1", Point: "/a", Type: "ext4", Source: "/dev/sda1"},
		{PID: 9, ID: 3, Number: "0:5", Point: "/b", Type: "tmpfs", Source: "none"},
	}
	if diff := cmp.Diff(want, slices.Collect(root.Mounts())); diff != "" {
		t.Error(diff)
	}
	for m := range root.Mounts() {
		if m != want[0] {
			t.Error("the first is another")
		}
		break
	}
	if diff := cmp.Diff([]int{9, 10, 11, 12}, root.Processes()); diff != "" {
		t.Error(diff)
	}
}

func TestProcessOf(t *testing.T) {
	initial := map[string]string{
		"proc/self/ns/pid": "->pid:[4026531836]",
		"proc/21/status":   "Name:\tx\nTgid:\t20\nPid:\t21\n",
	}
	tests := []struct {
		tid  int
		pid  int
		gone bool
	}{{21, 20, false}, {22, 0, true}, {0, 0, false}}
	root := files(t, initial)
	for _, tt := range tests {
		if pid, gone := root.ProcessOf(tt.tid); pid != tt.pid || gone != tt.gone {
			t.Errorf("thread %d: process %d, gone %t", tt.tid, pid, gone)
		}
	}
	initial["proc/self/ns/pid"] = "->pid:[4026532000]"
	if pid, gone := files(t, initial).ProcessOf(21); pid != 0 || gone {
		t.Errorf("in another namespace: process %d, gone %t", pid, gone)
	}
}

// TestIncarnation holds that an incarnation is the same for all who look, survives being written
// down, and is another one when the file is made anew.
func TestIncarnation(t *testing.T) {
	root := files(t, map[string]string{"sys/a": "7\n", "sys/link": "->a"})
	first, err := machine.IncarnationOf(root.Path("sys/a"))
	if err != nil || first == 0 {
		t.Fatal(first, err)
	}
	written := strconv.FormatUint(uint64(first), 10)
	read, err := strconv.ParseUint(written, 10, 64)
	if err != nil || machine.Incarnation(read) != first {
		t.Errorf("%s was read as %d, %v", written, read, err)
	}
	again, content, err := machine.ReadIncarnation(root.Path("sys/a"), true)
	if again != first || string(content) != "7\n" || err != nil {
		t.Errorf("read %d, %q, %v", again, content, err)
	}
	if link, err := machine.IncarnationOf(root.Path("sys/link")); link == first || err != nil {
		t.Errorf("the link is what it leads to, or %v", err)
	}
	if err := os.Rename(root.Path("sys/a"), root.Path("sys/b")); err != nil {
		t.Fatal(err)
	}
	if gone, err := machine.IncarnationOf(root.Path("sys/a")); gone != 0 || !os.IsNotExist(err) {
		t.Errorf("without a file %d, %v", gone, err)
	}
	if err := os.WriteFile(root.Path("sys/a"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if second, err := machine.IncarnationOf(root.Path("sys/a")); second == first || err != nil {
		t.Errorf("made anew it is the same, or %v", err)
	}
}
