package doctor

import "testing"

// TestKernel shows what is said of a kernel that can't be seen well.
func TestKernel(t *testing.T) {
	noProc := files{
		"proc/self/status":  "-",
		"proc/self/ns/user": "-",
		"proc/self/ns/pid":  "-",
		"proc/self/ns/net":  "-",
	}
	examineFiles(t, "kernel", []fileCase{
		{"healthy", nil, "ok kernel Linux 6.1.0-42-amd64"},
		{
			"no proc", noProc,
			"problem kernel /proc is not there; all that is known of devices and of who uses them is read there; " +
				"do: mount -t proc proc /proc",
		},
		{
			"odd version", files{"proc/sys/kernel/osrelease": "next"},
			`warning kernel its version "next" is not a number; what only the version tells is not known`,
		},
	})
}

// TestCapability shows what a process without privilege is told.
func TestCapability(t *testing.T) {
	const missing = "problem capability CAP_SYS_ADMIN is missing; " +
		"devices can be looked at from here, but not made or changed; do: sudo nbdctl doctor"
	examineFiles(t, "capability", []fileCase{
		{"healthy", nil, "ok capability CAP_SYS_ADMIN"},
		{"no capability", files{"proc/self/status": "CapEff:\t0000000000000000\n"}, missing},
		{"all capabilities but that", files{"proc/self/status": "CapEff:\t000001ffffdfffff\n"}, missing},
		{
			"user namespace", files{"proc/self/ns/user": "->user:[4026532000]"},
			"problem capability CAP_SYS_ADMIN, but not in the first user namespace; " +
				"the kernel asks for it there, so devices can't be made or changed from this container; " +
				"do: run nbdctl outside, or in a container without a user namespace of its own",
		},
	})
}

// TestSignals shows which kernels lose connections to signals.
func TestSignals(t *testing.T) {
	withoutNetAdmin := files{
		"proc/sys/kernel/osrelease": "6.12.9",
		"proc/self/status":          "CapEff:\t0000000000200000\n",
	}
	examineFiles(t, "signals", []fileCase{
		{"healthy", nil, "ok signals do not disturb connections on this kernel"},
		{
			"mended", files{"proc/sys/kernel/osrelease": "7.2.0"},
			"ok signals do not disturb connections on this kernel",
		},
		{
			"no CAP_NET_ADMIN", withoutNetAdmin,
			"warning signals this kernel loses a connection when a signal meets a thread that sends, " +
				"and CAP_NET_ADMIN is missing; " +
				"nbdctl can't give connections the large send buffers that keep it from happening; " +
				"do: run nbdctl with CAP_NET_ADMIN too",
		},
	})
}
