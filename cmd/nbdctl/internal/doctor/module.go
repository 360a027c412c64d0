package doctor

import (
	"context"
	"os"
	"path/filepath"
	"strings"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
)

// module tells whether the kernel has the driver, or could have it.
func (m *Machine) module(context.Context) []Finding {
	if m.loaded() {
		if m.modular() {
			return []Finding{ok("loaded")}
		}
		return []Finding{ok("built into the kernel")}
	}
	switch {
	case !m.present():
		return []Finding{m.absent()}
	case m.read("proc/sys/kernel/modules_disabled") == "1":
		f := problem(exit.Unsupported, "not loaded, and the kernel takes no more modules (kernel.modules_disabled)")
		return []Finding{f.do("echo nbd >/etc/modules-load.d/nbd.conf && reboot")}
	}
	if file, line := m.replacement(); line != "" {
		return []Finding{problem(exit.Unsupported, "not loaded, and %s keeps modprobe from it: %s", file, line).
			do("remove that line from %s, then modprobe nbd", file)}
	}
	f := warning("not loaded").because("nbdctl connect loads it").do("modprobe nbd")
	if m.privileged() && !m.capable(capSysModule) {
		return []Finding{f.
			because("CAP_SYS_MODULE is missing here, so nbdctl connect may fail to load it").
			do("modprobe nbd, outside of this container")}
	}
	if m.LoadModule != nil {
		f.Fix = func() (string, error) {
			if err := m.LoadModule(); err != nil {
				return "", err
			}
			return "modprobe nbd", nil
		}
	}
	return []Finding{f}
}

// modules returns the directory of this kernel's modules.
func (m *Machine) modules() string { return filepath.Join("lib/modules", m.release().Name) }

// present tells whether the module is among those of this kernel.
func (m *Machine) present() bool {
	for line := range strings.Lines(m.read(m.modules(), "modules.dep")) {
		file, _, _ := strings.Cut(line, ":")
		if name := filepath.Base(file); name == "nbd.ko" || strings.HasPrefix(name, "nbd.ko.") {
			return true
		}
	}
	return false
}

// absent says why the module is not among those of this kernel.
func (m *Machine) absent() Finding {
	if m.exists(m.modules()) {
		return problem(exit.Unsupported,
			"this kernel (%s) has no nbd driver, and its modules are without it", m.release().Name).
			do("%s", m.install())
	}
	if others, _ := os.ReadDir(m.path("lib/modules")); len(others) > 0 {
		return problem(exit.Unsupported,
			"not loaded, and the modules of the running kernel (%s) are not installed, but those of %s",
			m.release().Name, others[len(others)-1].Name()).
			because("the kernel was replaced while it ran").do("reboot")
	}
	return problem(exit.Unsupported, "not loaded, and there are no modules in /lib/modules, as in a container").
		do("modprobe nbd, on the host")
}

// install says how this distribution installs the module.
func (m *Machine) install() string {
	release := m.release().Name
	var ids []string
	for _, line := range m.configLines("etc/os-release") {
		key, value, _ := strings.Cut(line, "=")
		if key == "ID" || key == "ID_LIKE" {
			ids = append(ids, strings.Fields(strings.Trim(value, `"'`))...)
		}
	}
	for _, id := range ids {
		switch id {
		case "ubuntu":
			return "apt-get install linux-modules-extra-" + release
		case "debian":
			// "6.1.0-42-amd64", "6.1.0-42-cloud-amd64"; other kernels are not Debian's own.
			dash := strings.LastIndexByte(release, '-')
			if dash < 0 {
				return "apt-get install linux-image-$(dpkg --print-architecture) && reboot"
			}
			return "apt-get install linux-image" + release[dash:] + " && reboot"
		case "fedora":
			return "dnf install kernel-modules-" + release
		}
	}
	return "install all modules of this kernel, or one with CONFIG_BLK_DEV_NBD=m"
}

// replacement finds what makes modprobe run something else instead.
func (m *Machine) replacement() (file, line string) {
	for _, file := range m.configFiles(".conf", modprobeDirs...) {
		for _, line := range m.configLines(file) {
			words := strings.Fields(line)
			ofNBD := len(words) > 2 && words[0] == "install" && words[1] == "nbd"
			if ofNBD && !strings.Contains(line, "modprobe") {
				return file, line
			}
		}
	}
	return "", ""
}

// modprobeDirs are where modprobe.d(5) has its files, the first before the others.
var modprobeDirs = []string{
	"etc/modprobe.d",
	"run/modprobe.d",
	"usr/local/lib/modprobe.d",
	"usr/lib/modprobe.d",
	"lib/modprobe.d",
}
