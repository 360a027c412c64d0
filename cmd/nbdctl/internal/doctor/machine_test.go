package doctor

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/nbdnl"
)

// files are the files of a made-up machine, by their paths. A content that
// begins with "->" is that of a symbolic link.
type files map[string]string

// healthy are the files of a machine on which nothing is wrong.
var healthy = files{
	"proc/sys/kernel/osrelease":              "6.1.0-42-amd64\n",
	"proc/self/status":                       "Name:\tnbdctl\nCapEff:\t000001ffffffffff\n",
	"proc/self/ns/user":                      "->user:[4026531837]",
	"proc/self/ns/pid":                       "->pid:[4026531836]",
	"proc/self/ns/net":                       "->net:[1]",
	"proc/1/ns/net":                          "->net:[1]",
	"sys/module/nbd/initstate":               "live\n",
	"sys/module/nbd/parameters/nbds_max":     "2\n",
	"sys/module/nbd/parameters/max_part":     "31\n",
	"sys/block/nbd0/size":                    "0\n",
	"sys/block/nbd1/size":                    "0\n",
	"dev/nbd0":                               "",
	"dev/nbd1":                               "",
	"lib/modules/6.1.0-42-amd64/modules.dep": "kernel/drivers/block/loop.ko:\nkernel/drivers/block/nbd.ko.xz:\n",
}

// with returns the files with others in addition; "-" takes one away.
func (f files) with(others files) files {
	all := make(files)
	for _, set := range []files{f, others} {
		for path, content := range set {
			all[path] = content
		}
	}
	return all
}

// machine makes the machine that has them.
func (f files) machine(t *testing.T) *Machine {
	t.Helper()
	root := t.TempDir()
	for path, content := range f {
		if content == "-" {
			continue
		}
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		target, isLink := strings.CutPrefix(content, "->")
		var err error
		if isLink {
			err = os.Symlink(target, path)
		} else {
			err = os.WriteFile(path, []byte(content), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return &Machine{System: nbdnl.System{Root: root}}
}

// notLoaded are the changes that make a machine one without the driver.
var notLoaded = files{
	"sys/module/nbd/initstate":           "-",
	"sys/module/nbd/parameters/nbds_max": "-",
	"sys/module/nbd/parameters/max_part": "-",
	"sys/block/nbd0/size":                "-",
	"sys/block/nbd1/size":                "-",
	"sys/block/loop0/size":               "0\n",
}

// A fileCase is what a check that only looks at files makes of a machine.
type fileCase struct {
	name string
	// files are what the machine has other than the healthy one.
	files files
	// want is the line of the finding as it is printed, less its alignment.
	want string
}

// examineFiles runs a check on the machine of each case.
func examineFiles(t *testing.T, check string, cases []fileCase) {
	t.Helper()
	for _, tt := range cases {
		t.Run(tt.name, func(t *testing.T) {
			m := healthy.with(tt.files).machine(t)
			var got []string
			for _, c := range m.Checks() {
				if c.Name == check {
					Examine(t.Context(), []Check{c}, false, func(f Finding) {
						got = append(got, strings.Join(strings.Fields(f.String()), " "))
					})
				}
			}
			if diff := cmp.Diff([]string{tt.want}, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}
