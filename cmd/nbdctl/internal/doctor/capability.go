package doctor

import (
	"context"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
)

// capability tells whether this process may change devices.
func (m *Machine) capability(context.Context) []Finding {
	switch {
	case !m.capable(capSysAdmin):
		return []Finding{problem(exit.Permission, "CAP_SYS_ADMIN is missing").
			because("devices can be looked at from here, but not made or changed").
			do("sudo nbdctl doctor")}
	case m.inOtherUserNamespace():
		return []Finding{problem(exit.Permission, "CAP_SYS_ADMIN, but not in the first user namespace").
			because("the kernel asks for it there, so devices can't be made or changed from this container").
			do("run nbdctl outside, or in a container without a user namespace of its own")}
	}
	return []Finding{ok("CAP_SYS_ADMIN")}
}
