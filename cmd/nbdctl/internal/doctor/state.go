package doctor

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
)

// StateDirectory tells whether nbdctl can keep its records in dir, and whether
// others can read and nobody else can write them.
func (m *Machine) StateDirectory(dir string) Check {
	return Check{"state", func(context.Context) []Finding { return []Finding{m.stateDirectory(dir)} }}
}

func (m *Machine) stateDirectory(dir string) Finding {
	info, err := os.Stat(m.path(dir))
	if errors.Is(err, fs.ErrNotExist) {
		m.newState = dir
		above := dir
		for err != nil && above != "/" {
			above = filepath.Dir(above)
			_, err = os.Stat(m.path(above))
		}
		return m.writable(above, ok("%s will be made when it is needed", dir))
	}
	switch {
	case err != nil:
		return problem(exit.Failure, "%v", err)
	case !info.IsDir():
		return problem(exit.Failure, "%s is not a directory", dir).do("rm %s", dir)
	}
	if uid, known := ownerOf(info); known && uid != 0 && uid != os.Geteuid() {
		return problem(exit.Failure, "%s belongs to user %d", dir, uid).
			because("who can write there can make nbdctl believe anything of devices and processes").
			do("chown 0:0 %s", dir)
	}
	mode := info.Mode().Perm()
	switch {
	case mode&0o022 != 0 && info.Mode()&fs.ModeSticky == 0:
		return problem(exit.Failure, "%s can be written by others (mode %04o)", dir, mode).
			because("who can write there can make nbdctl believe anything of devices and processes").
			do("chmod 0755 %s", dir)
	case mode&0o005 != 0o005:
		return warning("%s can't be read by everybody (mode %04o)", dir, mode).
			because("nbdctl list shows others less than there is").
			do("chmod 0755 %s", dir)
	}
	return m.writable(dir, ok("%s", dir))
}

// writable is the finding f, unless a privileged process can't write there.
func (m *Machine) writable(dir string, f Finding) Finding {
	if !m.privileged() {
		return f
	}
	if err := mayWrite(m.path(dir)); err != nil {
		return problem(exit.Failure, "%s can't be written: %v", dir, err).
			because("nbdctl connect keeps a record of each device there").
			do("mount a tmpfs there, or set NBDCTL_STATE_DIR to a directory that can be written")
	}
	return f
}
