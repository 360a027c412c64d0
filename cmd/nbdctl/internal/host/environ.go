package host

import (
	"os"
	"strings"
)

// filesVariable lists the names of the inherited files, from descriptor 3 on. A number
// that is not in use has an empty name.
const filesVariable = "NBDCTL_FILES"

// Environment variables of what systemd starts.
const (
	// meetVariable is the path of the socket at which a keeper meets the process that it is for.
	meetVariable = "NBDCTL_KEEPER"
	// unitVariable is the name of the keeper's unit.
	unitVariable = "NBDCTL_UNIT"
)

// ofUnit reports whether an environment variable is of the unit that this process is in.
func ofUnit(name string) bool {
	switch name {
	case meetVariable, unitVariable, filesVariable, "NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES",
		"INVOCATION_ID", "JOURNAL_STREAM", "SYSTEMD_EXEC_PID", "FDSTORE":
		return true
	}
	return false
}

// environ is the environment that a process passes on to the one that takes its place.
func environ() (passed []string) {
	for _, v := range os.Environ() {
		if name, _, _ := strings.Cut(v, "="); !ofUnit(name) {
			passed = append(passed, v)
		}
	}
	return passed
}
