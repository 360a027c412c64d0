package doctor

import (
	"strings"
	"testing"
)

// TestSecurity shows what is said of SELinux.
func TestSecurity(t *testing.T) {
	permissive := files{"sys/fs/selinux/enforce": "0", "proc/sys/kernel/osrelease": "6.12.1"}
	examineFiles(t, "security", []fileCase{
		{"healthy", nil, "ok security neither SELinux nor AppArmor"},
		{
			"SELinux before", files{"sys/fs/selinux/enforce": "1"},
			"ok security SELinux, which does not disturb connections on this kernel",
		},
		{"SELinux permissive", permissive, "ok security SELinux is permissive"},
	})
}

// TestSecurityReleases shows which kernels ask AppArmor about connections.
func TestSecurityReleases(t *testing.T) {
	for release, affected := range map[string]bool{
		"5.10.223":             false,
		"6.1.192":              false,
		"6.10.14":              false,
		"6.11.0":               true,
		"6.12.55-rt1":          true,
		"6.12.56":              false,
		"6.12.107+deb13-amd64": false,
		"6.13.1":               true,
		"6.17.5-arch1":         true,
		"6.17.6":               false,
		"6.18.0-rc1":           false,
		"7.3.4":                false,
	} {
		m := healthy.with(files{
			"proc/sys/kernel/osrelease":              release,
			"sys/module/apparmor/parameters/enabled": "Y\n",
		}).machine(t)
		f := m.security(t.Context())[0]
		if got := f.Result == Warning; got != affected || !strings.HasPrefix(f.Seen, "AppArmor") {
			t.Errorf("%s: %v", release, f)
		}
	}
}
