package doctor

// Checks are all checks of the machine but those that know nbdctl's own
// devices, which come in between as further.
func (m *Machine) Checks(further ...Check) []Check {
	checks := []Check{
		{"kernel", m.kernel},
		{"capability", m.capability},
		{"module", m.module},
		{"options", m.options},
		{"parameters", m.parameters},
		{"control", m.control},
		{"nodes", m.nodes},
	}
	checks = append(checks, further...)
	return append(checks, []Check{
		{"held", m.held},
		{"udev", m.udev},
		{"security", m.security},
		{"signals", m.signals},
		{"device", m.device},
		{"features", m.features},
		{"sockets", m.sockets},
		{"openers", m.openers},
		{"cost", m.cost},
	}...)
}
