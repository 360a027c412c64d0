package doctor

import "testing"

// TestModule shows what is said of a kernel without the driver, and what is to be done about it.
func TestModule(t *testing.T) {
	const (
		dependencies = "lib/modules/6.1.0-42-amd64/modules.dep"
		othersOnly   = "kernel/fs/9p/9p.ko:\n"
	)
	forbidden := notLoaded.with(files{"etc/modprobe.d/hard.conf": "# no\ninstall nbd /bin/false\n"})
	cloud := notLoaded.with(files{
		"proc/sys/kernel/osrelease":                    "6.1.0-42-cloud-amd64\n",
		"lib/modules/6.1.0-42-cloud-amd64/modules.dep": othersOnly,
		"etc/os-release":                               "ID=debian\n",
	})
	ubuntu := notLoaded.with(files{
		dependencies:     othersOnly,
		"etc/os-release": "ID=ubuntu\nID_LIKE=debian\n",
	})
	another := notLoaded.with(files{dependencies: "kernel/block/nbd-not.ko:\n"})

	examineFiles(t, "module", []fileCase{
		{"healthy", nil, "ok module loaded"},
		{"built in", files{"sys/module/nbd/initstate": "-"}, "ok module built into the kernel"},
		{"not loaded", notLoaded, "warning module not loaded; nbdctl connect loads it; do: modprobe nbd"},
		{
			"no CAP_SYS_MODULE", notLoaded.with(files{"proc/self/status": "CapEff:\t0000000000200000\n"}),
			"warning module not loaded; CAP_SYS_MODULE is missing here, so nbdctl connect may fail to load it; " +
				"do: modprobe nbd, outside of this container",
		},
		{
			"no more modules", notLoaded.with(files{"proc/sys/kernel/modules_disabled": "1\n"}),
			"problem module not loaded, and the kernel takes no more modules (kernel.modules_disabled); " +
				"do: echo nbd >/etc/modules-load.d/nbd.conf && reboot",
		},
		{
			"forbidden", forbidden,
			"problem module not loaded, and /etc/modprobe.d/hard.conf keeps modprobe from it: " +
				"install nbd /bin/false; do: remove that line from /etc/modprobe.d/hard.conf, then modprobe nbd",
		},
		{
			"cloud kernel", cloud,
			"problem module this kernel (6.1.0-42-cloud-amd64) has no nbd driver, and its modules are without it; " +
				"do: apt-get install linux-image-amd64 && reboot",
		},
		{
			"Ubuntu", ubuntu,
			"problem module this kernel (6.1.0-42-amd64) has no nbd driver, and its modules are without it; " +
				"do: apt-get install linux-modules-extra-6.1.0-42-amd64",
		},
		{
			"another distribution", another,
			"problem module this kernel (6.1.0-42-amd64) has no nbd driver, and its modules are without it; " +
				"do: install all modules of this kernel, or one with CONFIG_BLK_DEV_NBD=m",
		},
		{
			"upgraded", notLoaded.with(files{"proc/sys/kernel/osrelease": "6.1.0-41-amd64\n"}),
			"problem module not loaded, and the modules of the running kernel (6.1.0-41-amd64) are not installed, " +
				"but those of 6.1.0-42-amd64; the kernel was replaced while it ran; do: reboot",
		},
		{
			"container", notLoaded.with(files{dependencies: "-"}),
			"problem module not loaded, and there are no modules in /lib/modules, as in a container; " +
				"do: modprobe nbd, on the host",
		},
	})
}
