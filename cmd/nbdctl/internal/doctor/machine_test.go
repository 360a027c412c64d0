package doctor

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
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
	"sys/module/nbd/initstate": "-", "sys/module/nbd/parameters/nbds_max": "-", "sys/module/nbd/parameters/max_part": "-",
	"sys/block/nbd0/size": "-", "sys/block/nbd1/size": "-", "sys/block/loop0/size": "0\n",
}

// TestFiles shows what the checks that only look at files make of a machine.
func TestFiles(t *testing.T) {
	const typo = "sed -i 's/\\bmax_dev=/nbds_max=/' /etc/modprobe.d/nbd.conf && modprobe -r nbd && modprobe nbd"
	for _, tt := range []struct {
		name, check string
		files       files
		// want are the lines as they are printed, less their alignment.
		want []string
	}{
		{"healthy", "kernel", nil, []string{"ok kernel Linux 6.1.0-42-amd64"}},
		{"no proc", "kernel", files{"proc/self/status": "-", "proc/self/ns/user": "-", "proc/self/ns/pid": "-", "proc/self/ns/net": "-"},
			[]string{"problem kernel /proc is not there; all that is known of devices and of who uses them is read there; do: mount -t proc proc /proc"}},
		{"odd version", "kernel", files{"proc/sys/kernel/osrelease": "next"}, []string{`warning kernel its version "next" is not a number; what only the version tells is not known`}},

		{"healthy", "capability", nil, []string{"ok capability CAP_SYS_ADMIN"}},
		{"no capability", "capability", files{"proc/self/status": "CapEff:\t0000000000000000\n"},
			[]string{"problem capability CAP_SYS_ADMIN is missing; devices can be looked at from here, but not made or changed; do: sudo nbdctl doctor"}},
		{"all capabilities but that", "capability", files{"proc/self/status": "CapEff:\t000001ffffdfffff\n"},
			[]string{"problem capability CAP_SYS_ADMIN is missing; devices can be looked at from here, but not made or changed; do: sudo nbdctl doctor"}},
		{"user namespace", "capability", files{"proc/self/ns/user": "->user:[4026532000]"},
			[]string{"problem capability CAP_SYS_ADMIN, but not in the first user namespace; the kernel asks for it there, so devices can't be made or changed from this container; do: run nbdctl outside, or in a container without a user namespace of its own"}},

		{"healthy", "module", nil, []string{"ok module loaded"}},
		{"built in", "module", files{"sys/module/nbd/initstate": "-"}, []string{"ok module built into the kernel"}},
		{"not loaded", "module", notLoaded, []string{"warning module not loaded; nbdctl connect loads it; do: modprobe nbd"}},
		{"no CAP_SYS_MODULE", "module", notLoaded.with(files{"proc/self/status": "CapEff:\t0000000000200000\n"}),
			[]string{"warning module not loaded; CAP_SYS_MODULE is missing here, so nbdctl connect may fail to load it; do: modprobe nbd, outside of this container"}},
		{"no more modules", "module", notLoaded.with(files{"proc/sys/kernel/modules_disabled": "1\n"}),
			[]string{"problem module not loaded, and the kernel takes no more modules (kernel.modules_disabled); do: echo nbd >/etc/modules-load.d/nbd.conf && reboot"}},
		{"forbidden", "module", notLoaded.with(files{"etc/modprobe.d/hard.conf": "# no\ninstall nbd /bin/false\n"}),
			[]string{"problem module not loaded, and /etc/modprobe.d/hard.conf keeps modprobe from it: install nbd /bin/false; do: remove that line from /etc/modprobe.d/hard.conf, then modprobe nbd"}},
		{"cloud kernel", "module", notLoaded.with(files{"proc/sys/kernel/osrelease": "6.1.0-42-cloud-amd64\n", "lib/modules/6.1.0-42-cloud-amd64/modules.dep": "kernel/fs/9p/9p.ko:\n", "etc/os-release": "ID=debian\n"}),
			[]string{"problem module this kernel (6.1.0-42-cloud-amd64) has no nbd driver, and its modules are without it; do: apt-get install linux-image-amd64 && reboot"}},
		{"Ubuntu", "module", notLoaded.with(files{"lib/modules/6.1.0-42-amd64/modules.dep": "kernel/fs/9p/9p.ko:\n", "etc/os-release": "ID=ubuntu\nID_LIKE=debian\n"}),
			[]string{"problem module this kernel (6.1.0-42-amd64) has no nbd driver, and its modules are without it; do: apt-get install linux-modules-extra-6.1.0-42-amd64"}},
		{"another distribution", "module", notLoaded.with(files{"lib/modules/6.1.0-42-amd64/modules.dep": "kernel/block/nbd-not.ko:\n"}),
			[]string{"problem module this kernel (6.1.0-42-amd64) has no nbd driver, and its modules are without it; do: install all modules of this kernel, or one with CONFIG_BLK_DEV_NBD=m"}},
		{"upgraded", "module", notLoaded.with(files{"proc/sys/kernel/osrelease": "6.1.0-41-amd64\n"}),
			[]string{"problem module not loaded, and the modules of the running kernel (6.1.0-41-amd64) are not installed, but those of 6.1.0-42-amd64; the kernel was replaced while it ran; do: reboot"}},
		{"container", "module", notLoaded.with(files{"lib/modules/6.1.0-42-amd64/modules.dep": "-"}),
			[]string{"problem module not loaded, and there are no modules in /lib/modules, as in a container; do: modprobe nbd, on the host"}},

		{"healthy", "options", nil, []string{"ok options none for nbd in modprobe.d"}},
		{"in force", "options", files{"etc/modprobe.d/nbd.conf": "options nbd nbds_max=2 \\\n max_part=16\noptions loop max_loop=64\n"},
			[]string{"ok options nbds_max=2 in /etc/modprobe.d/nbd.conf, max_part=16 in /etc/modprobe.d/nbd.conf"}},
		{"misspelt", "options", files{"etc/modprobe.d/nbd.conf": "options nbd max_dev=4096\n"},
			[]string{"warning options max_dev=4096 in /etc/modprobe.d/nbd.conf: nbd has no such parameter; the kernel ignores it and says so in its log alone; do: " + typo}},
		{"misspelt, not loaded", "options", notLoaded.with(files{"etc/modprobe.d/nbd.conf": "options nbd max_dev=4096\n"}),
			[]string{"warning options max_dev=4096 in /etc/modprobe.d/nbd.conf: nbd has no such parameter; the kernel ignores it and says so in its log alone; do: " + typo}},
		{"misspelt at boot", "options", files{"proc/cmdline": "quiet nbd.maxparts=4\n"},
			[]string{"warning options maxparts=4 in the kernel's command line: nbd has no such parameter; the kernel ignores it and says so in its log alone; do: write nbd.max_part=4 there, and reboot"}},
		{"of a later kernel", "options", files{"etc/modprobe.d/nbd.conf": "options nbd pre_defined_connections=4\n"},
			[]string{"warning options pre_defined_connections=4 in /etc/modprobe.d/nbd.conf: nbd has no such parameter; the kernel ignores it and says so in its log alone; do: remove it; there are nbds_max and max_part"}},
		{"no number", "options", files{"etc/modprobe.d/nbd.conf": "options nbd nbds_max=many\n"},
			[]string{"warning options nbds_max=many in /etc/modprobe.d/nbd.conf is not a number; the module, which is loaded without it, can't be loaded with it after the next reboot; do: put a number there"}},
		{"no number, built in", "options", files{"sys/module/nbd/initstate": "-", "proc/cmdline": "nbd.max_part=many\n"},
			[]string{"warning options max_part=many in the kernel's command line is not a number; the driver is built into this kernel, which ignores it; do: put a number there"}},
		{"no number, not loaded", "options", notLoaded.with(files{"etc/modprobe.d/nbd.conf": "options nbd nbds_max=many\n"}),
			[]string{"problem options nbds_max=many in /etc/modprobe.d/nbd.conf is not a number; the module can't be loaded with it; do: put a number there"}},
		{"not in force", "options", files{"etc/modprobe.d/nbd.conf": "options nbd nbds_max=64\n"},
			[]string{"warning options nbds_max=64 in /etc/modprobe.d/nbd.conf is not in force: the module was loaded with 2; do: modprobe -r nbd && modprobe nbd"}},
		{"hidden by an earlier file", "options", files{"usr/lib/modprobe.d/nbd.conf": "options nbd max_dev=4096\n", "etc/modprobe.d/nbd.conf": "options nbd nbds_max=2\n"},
			[]string{"ok options nbds_max=2 in /etc/modprobe.d/nbd.conf"}},

		{"healthy", "parameters", nil, []string{"ok parameters nbds_max=2 max_part=31: 2 devices in advance, further ones are made when needed; up to 31 partitions on each"}},
		{"no partitions", "parameters", files{"sys/module/nbd/parameters/max_part": "0\n"},
			[]string{"warning parameters nbds_max=2 max_part=0; the kernel does not look for partitions on devices; do: modprobe -r nbd && modprobe nbd max_part=16"}},
		{"not loaded", "parameters", notLoaded, []string{"unknown parameters not looked at: needs the nbd module"}},
		{"not loaded", "control", notLoaded, []string{"unknown control not looked at: needs the nbd module"}},

		{"healthy", "nodes", nil, []string{"ok nodes 2 devices, /dev/nbd0 to /dev/nbd1"}},
		{"none", "nodes", files{"dev/nbd0": "-", "dev/nbd1": "-"},
			[]string{"problem nodes the kernel has 2 devices, none of which is in /dev; as in a container whose /dev is its own; a device can't be used here without its node; do: docker run --volume /dev:/dev …, or mount -t devtmpfs devtmpfs /dev"}},
		{"some", "nodes", files{"dev/nbd1": "-"},
			[]string{"warning nodes 1 of 2 devices are not in /dev: /dev/nbd1; as in a container whose /dev is its own; a device can't be used here without its node; do: docker run --volume /dev:/dev …, or mount -t devtmpfs devtmpfs /dev"}},

		{"healthy", "security", nil, []string{"ok security neither SELinux nor AppArmor"}},
		{"SELinux before", "security", files{"sys/fs/selinux/enforce": "1"}, []string{"ok security SELinux, which does not disturb connections on this kernel"}},
		{"SELinux permissive", "security", files{"sys/fs/selinux/enforce": "0", "proc/sys/kernel/osrelease": "6.12.1"}, []string{"ok security SELinux is permissive"}},
		{"healthy", "signals", nil, []string{"ok signals do not disturb connections on this kernel"}},
		{"mended", "signals", files{"proc/sys/kernel/osrelease": "7.2.0"}, []string{"ok signals do not disturb connections on this kernel"}},
		{"no CAP_NET_ADMIN", "signals", files{"proc/sys/kernel/osrelease": "6.12.9", "proc/self/status": "CapEff:\t0000000000200000\n"},
			[]string{"warning signals this kernel loses a connection when a signal meets a thread that sends, and CAP_NET_ADMIN is missing; nbdctl can't give connections the large send buffers that keep it from happening; do: run nbdctl with CAP_NET_ADMIN too"}},
	} {
		t.Run(tt.check+"/"+tt.name, func(t *testing.T) {
			m := healthy.with(tt.files).machine(t)
			var got []string
			for _, c := range m.Checks() {
				if c.Name == tt.check {
					Examine(t.Context(), []Check{c}, false, func(f Finding) {
						got = append(got, strings.Join(strings.Fields(f.String()), " "))
					})
				}
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestSecurityReleases shows which kernels ask SELinux about connections.
func TestSecurityReleases(t *testing.T) {
	for release, affected := range map[string]bool{
		"5.10.223": false, "6.1.192": false, "6.10.14": false, "6.11.0": true, "6.12.55-rt1": true, "6.12.56": false, "6.12.107+deb13-amd64": false,
		"6.13.1": true, "6.17.5-arch1": true, "6.17.6": false, "6.18.0-rc1": false, "7.3.4": false,
	} {
		m := healthy.with(files{"proc/sys/kernel/osrelease": release, "sys/module/apparmor/parameters/enabled": "Y\n"}).machine(t)
		f := m.security(t.Context())[0]
		if got := f.Result == Warning; got != affected || !strings.HasPrefix(f.Seen, "AppArmor") {
			t.Errorf("%s: %v", release, f)
		}
	}
}

// TestState shows what is said of state directories.
func TestState(t *testing.T) {
	for _, tt := range []struct {
		name string
		make string // the directory that exists, "" for none
		mode os.FileMode
		want Result
		says string
	}{
		{"not there", "", 0, OK, "/run/nbdctl will be made when it is needed"},
		{"good", "run/nbdctl", 0o755, OK, "/run/nbdctl"},
		{"writable by others", "run/nbdctl", 0o777, Problem, "can be written by others (mode 0777)"},
		{"secret", "run/nbdctl", 0o700, Warning, "can't be read by everybody (mode 0700)"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := healthy.machine(t)
			if tt.make != "" {
				dir := m.path(tt.make)
				if err := os.MkdirAll(dir, 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.Chmod(dir, tt.mode); err != nil {
					t.Fatal(err)
				}
			}
			f := m.StateDirectory("/run/nbdctl").Look(t.Context())[0]
			if f.Result != tt.want || !strings.Contains(f.Seen, tt.says) {
				t.Errorf("%v, want %s and %q", f, tt.want, tt.says)
			}
		})
	}
	m := healthy.with(files{"run/nbdctl": "a file"}).machine(t)
	if f := m.stateDirectory("/run/nbdctl"); f.Result != Problem || f.Remedy != "rm /run/nbdctl" || f.Code != exit.Failure {
		t.Error(f)
	}
}
