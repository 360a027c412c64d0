package doctor

import (
	"context"
	"strings"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
)

// nodes tells whether devices can be opened, which is by a node in /dev.
func (m *Machine) nodes(context.Context) []Finding {
	m.nodeless = false
	if !m.loaded() {
		return []Finding{unknown("the nbd module")}
	}
	devices := m.devices()
	if len(devices) == 0 {
		return []Finding{ok("there is no device yet")}
	}
	var missing []string
	for _, d := range devices {
		if !m.exists("dev", d) {
			missing = append(missing, "/dev/"+d)
		}
	}
	const (
		why    = "as in a container whose /dev is its own; a device can't be used here without its node"
		remedy = "docker run --volume /dev:/dev …, or mount -t devtmpfs devtmpfs /dev"
	)
	switch len(missing) {
	case 0:
		return []Finding{ok("%d devices, /dev/%s to /dev/%s", len(devices), devices[0], devices[len(devices)-1])}
	case len(devices):
		m.nodeless = true
		f := problem(exit.Failure, "the kernel has %d devices, none of which is in /dev", len(devices))
		return []Finding{f.because(why).do(remedy)}
	}
	f := warning("%d of %d devices are not in /dev: %s", len(missing), len(devices), few(missing))
	return []Finding{f.because(why).do(remedy)}
}

// few names the first of many.
func few(names []string) string {
	const most = 4
	if len(names) > most {
		return strings.Join(names[:most], ", ") + " …"
	}
	return strings.Join(names, ", ")
}
