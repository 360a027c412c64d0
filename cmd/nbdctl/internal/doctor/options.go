package doctor

import (
	"context"
	"fmt"
	"math/bits"
	"strconv"
	"strings"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
)

// The parameters of the module (nbd.c, module_param), those of later kernels included.
const (
	devicesParameter     = "nbds_max"
	partitionsParameter  = "max_part"
	connectionsParameter = "pre_defined_connections"
)

// parameters tells what the module was loaded with, in words.
func (m *Machine) parameters(context.Context) []Finding {
	if !m.loaded() {
		return []Finding{unknown("the nbd module")}
	}
	devices, partitions := m.parameter(devicesParameter), m.parameter(partitionsParameter)
	seen := fmt.Sprintf("%s=%s %s=%s", devicesParameter, devices, partitionsParameter, partitions)
	if n := m.parameter(connectionsParameter); n != "" {
		seen += fmt.Sprintf(" %s=%s", connectionsParameter, n)
	}
	if partitions == "0" {
		return []Finding{warning("%s", seen).
			because("the kernel does not look for partitions on devices").
			do("modprobe -r nbd && modprobe nbd max_part=16")}
	}
	return []Finding{ok("%s: %s devices in advance, further ones are made when needed; up to %s partitions on each",
		seen, devices, partitions)}
}

func (m *Machine) parameter(name string) string { return m.read("sys/module/nbd/parameters", name) }

// An option is a parameter as somebody has set it for the time when the module is loaded.
type option struct {
	file        string // "" on the kernel's command line
	name, value string
}

func (o option) place() string {
	if o.file == "" {
		return "the kernel's command line"
	}
	return o.file
}

// options looks for parameters that the module does not know, which it ignores
// but for a line in the kernel's log, and for those that are not in force.
func (m *Machine) options(context.Context) []Finding {
	set := m.setOptions()
	var findings []Finding
	last := make(map[string]option)
	for _, o := range set {
		switch {
		case !m.knownParameter(o.name):
			findings = append(findings, m.misspelt(o))
		case !isNumber(o.value):
			findings = append(findings, m.noNumber(o))
		default:
			last[o.name] = o
		}
	}
	for _, name := range []string{devicesParameter, partitionsParameter, connectionsParameter} {
		o, isSet := last[name]
		force := m.parameter(name)
		if isSet && force != "" && !m.same(name, o.value, force) {
			f := warning("%s=%s in %s is not in force: the module was loaded with %s", name, o.value, o.place(), force)
			findings = append(findings, f.do("modprobe -r nbd && modprobe nbd"))
		}
	}
	switch {
	case findings != nil:
		return findings
	case len(set) == 0:
		return []Finding{ok("none for nbd in modprobe.d")}
	}
	var names []string
	for _, o := range set {
		names = append(names, fmt.Sprintf("%s=%s in %s", o.name, o.value, o.place()))
	}
	return []Finding{ok("%s", strings.Join(names, ", "))}
}

// setOptions lists the parameters of nbd that somebody has set.
func (m *Machine) setOptions() []option {
	var set []option
	for _, file := range m.configFiles(".conf", modprobeDirs...) {
		for _, line := range m.configLines(file) {
			words := strings.Fields(line)
			if len(words) < 3 || words[0] != "options" || words[1] != "nbd" {
				continue
			}
			for _, word := range words[2:] {
				name, value, _ := strings.Cut(word, "=")
				set = append(set, option{file, name, value})
			}
		}
	}
	for _, word := range strings.Fields(m.read("proc/cmdline")) {
		if parameter, isOurs := strings.CutPrefix(word, "nbd."); isOurs {
			name, value, _ := strings.Cut(parameter, "=")
			set = append(set, option{"", name, value})
		}
	}
	return set
}

// knownParameter tells whether the module has that parameter.
func (m *Machine) knownParameter(name string) bool {
	name = strings.ReplaceAll(name, "-", "_") // for which the kernel takes it, too
	switch {
	case name == devicesParameter, name == partitionsParameter:
		return true
	case m.loaded():
		return m.parameter(name) != ""
	}
	return name == connectionsParameter
}

// misspelt is the finding about a parameter that does not exist.
func (m *Machine) misspelt(o option) Finding {
	f := warning("%s=%s in %s: nbd has no such parameter", o.name, o.value, o.place()).
		because("the kernel ignores it and says so in its log alone")
	meant := ""
	switch {
	case strings.Contains(o.name, "part"):
		meant = partitionsParameter
	case strings.Contains(o.name, "dev"), strings.Contains(o.name, "nbd"), strings.Contains(o.name, "max"):
		meant = devicesParameter
	}
	switch {
	case meant == "":
		return f.do("remove it; there are %s and %s", devicesParameter, partitionsParameter)
	case o.file == "":
		return f.do("write nbd.%s=%s there, and reboot", meant, o.value)
	}
	return f.do("sed -i 's/\\b%s=/%s=/' %s && modprobe -r nbd && modprobe nbd", o.name, meant, o.file)
}

// noNumber is the finding about a value that the module can't be loaded with.
func (m *Machine) noNumber(o option) Finding {
	seen := fmt.Sprintf("%s=%s in %s is not a number", o.name, o.value, o.place())
	const remedy = "put a number there"
	switch {
	case !m.loaded():
		return problem(exit.Unsupported, "%s", seen).because("the module can't be loaded with it").do(remedy)
	case !m.modular():
		return warning("%s", seen).because("the driver is built into this kernel, which ignores it").do(remedy)
	}
	return warning("%s", seen).
		because("the module, which is loaded without it, can't be loaded with it after the next reboot").
		do(remedy)
}

// same tells whether a parameter was loaded with that value.
func (m *Machine) same(name, value, force string) bool {
	want, err1 := strconv.ParseInt(value, 0, 64)
	have, err2 := strconv.ParseInt(force, 0, 64)
	if err1 != nil || err2 != nil {
		return value == force
	}
	if name == partitionsParameter && want > 0 {
		want = 1<<bits.Len64(uint64(want)) - 1 // nbd_init rounds it up so
	}
	return want == have
}

func isNumber(s string) bool {
	_, err := strconv.ParseInt(s, 0, 32)
	return err == nil
}
