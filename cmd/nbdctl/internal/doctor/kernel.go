package doctor

import (
	"context"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
)

// kernel tells which one it is, and whether it can be seen at all.
func (m *Machine) kernel(context.Context) []Finding {
	var findings []Finding
	for _, fs := range []struct{ shows, kind, point string }{
		{"proc/self", "proc", "/proc"},
		{"sys/block", "sysfs", "/sys"},
	} {
		if !m.exists(fs.shows) {
			findings = append(findings, problem(exit.Failure, "%s is not there", fs.point).
				because("all that is known of devices and of who uses them is read there").
				do("mount -t %s %s %s", fs.kind, fs.kind, fs.point))
		}
	}
	if findings != nil {
		return findings
	}
	if !m.release().Known() {
		return []Finding{warning("its version %q is not a number", m.release().Name).
			because("what only the version tells is not known")}
	}
	return []Finding{ok("Linux %s", m.release().Name)}
}

// signals tells of the kernels that lose a connection when a signal, which the
// Go runtime sends all the time, meets a thread that sends a request.
func (m *Machine) signals(context.Context) []Finding {
	r := m.release()
	if r.Before(6, 2, 0) || !r.Before(7, 2, 0) {
		return []Finding{ok("do not disturb connections on this kernel")}
	}
	if m.privileged() && !m.capable(capNetAdmin) {
		return []Finding{warning("this kernel loses a connection when a signal meets a thread that sends, " +
			"and CAP_NET_ADMIN is missing").
			because("nbdctl can't give connections the large send buffers that keep it from happening").
			do("run nbdctl with CAP_NET_ADMIN too")}
	}
	return []Finding{ok("this kernel loses a connection when a signal meets a thread that sends; " +
		"nbdctl keeps it from happening to its devices (no I/O scheduler, send buffers of 8 MiB)")}
}
