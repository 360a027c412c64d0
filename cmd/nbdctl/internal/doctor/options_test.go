package doctor

import "testing"

// modprobeConf are the files of a machine whose modprobe.d has that content.
func modprobeConf(content string) files { return files{"etc/modprobe.d/nbd.conf": content} }

// TestOptions shows what is said of parameters that somebody has set.
func TestOptions(t *testing.T) {
	const (
		ignored  = "nbd has no such parameter; the kernel ignores it and says so in its log alone"
		misspelt = "warning options max_dev=4096 in /etc/modprobe.d/nbd.conf: " + ignored + "; " +
			"do: sed -i 's/\\bmax_dev=/nbds_max=/' /etc/modprobe.d/nbd.conf && modprobe -r nbd && modprobe nbd"
	)
	builtIn := files{"sys/module/nbd/initstate": "-", "proc/cmdline": "nbd.max_part=many\n"}
	hidden := files{
		"usr/lib/modprobe.d/nbd.conf": "options nbd max_dev=4096\n",
		"etc/modprobe.d/nbd.conf":     "options nbd nbds_max=2\n",
	}

	examineFiles(t, "options", []fileCase{
		{"healthy", nil, "ok options none for nbd in modprobe.d"},
		{
			"in force", modprobeConf("options nbd nbds_max=2 \\\n max_part=16\noptions loop max_loop=64\n"),
			"ok options nbds_max=2 in /etc/modprobe.d/nbd.conf, max_part=16 in /etc/modprobe.d/nbd.conf",
		},
		{"misspelt", modprobeConf("options nbd max_dev=4096\n"), misspelt},
		{"misspelt, not loaded", notLoaded.with(modprobeConf("options nbd max_dev=4096\n")), misspelt},
		{
			"misspelt at boot", files{"proc/cmdline": "quiet nbd.maxparts=4\n"},
			"warning options maxparts=4 in the kernel's command line: " + ignored + "; " +
				"do: write nbd.max_part=4 there, and reboot",
		},
		{
			"of a later kernel", modprobeConf("options nbd pre_defined_connections=4\n"),
			"warning options pre_defined_connections=4 in /etc/modprobe.d/nbd.conf: " + ignored + "; " +
				"do: remove it; there are nbds_max and max_part",
		},
		{
			"no number", modprobeConf("options nbd nbds_max=many\n"),
			"warning options nbds_max=many in /etc/modprobe.d/nbd.conf is not a number; " +
				"the module, which is loaded without it, can't be loaded with it after the next reboot; " +
				"do: put a number there",
		},
		{
			"no number, built in", builtIn,
			"warning options max_part=many in the kernel's command line is not a number; " +
				"the driver is built into this kernel, which ignores it; do: put a number there",
		},
		{
			"no number, not loaded", notLoaded.with(modprobeConf("options nbd nbds_max=many\n")),
			"problem options nbds_max=many in /etc/modprobe.d/nbd.conf is not a number; " +
				"the module can't be loaded with it; do: put a number there",
		},
		{
			"not in force", modprobeConf("options nbd nbds_max=64\n"),
			"warning options nbds_max=64 in /etc/modprobe.d/nbd.conf is not in force: " +
				"the module was loaded with 2; do: modprobe -r nbd && modprobe nbd",
		},
		{"hidden by an earlier file", hidden, "ok options nbds_max=2 in /etc/modprobe.d/nbd.conf"},
	})
}

// TestParameters shows what is said of those with which the module was loaded.
func TestParameters(t *testing.T) {
	examineFiles(t, "parameters", []fileCase{
		{
			"healthy", nil,
			"ok parameters nbds_max=2 max_part=31: " +
				"2 devices in advance, further ones are made when needed; up to 31 partitions on each",
		},
		{
			"no partitions", files{"sys/module/nbd/parameters/max_part": "0\n"},
			"warning parameters nbds_max=2 max_part=0; the kernel does not look for partitions on devices; " +
				"do: modprobe -r nbd && modprobe nbd max_part=16",
		},
		{"not loaded", notLoaded, "unknown parameters not looked at: needs the nbd module"},
	})
}
