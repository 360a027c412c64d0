package doctor

import "context"

// security tells whether SELinux or AppArmor can break connections. The driver
// sends requests in the context of the thread that uses the device, and the
// kernel then asks them whether that thread may use the socket. From Linux 6.18
// on, and in the stable releases 6.12.56 and 6.17.6, it sends on its own behalf;
// before 6.11 a thread of the kernel does it ("block: add plug while submitting IO").
func (m *Machine) security(context.Context) []Finding {
	module := ""
	switch m.read("sys/fs/selinux/enforce") {
	case "1":
		module = "SELinux"
	case "0":
		return []Finding{ok("SELinux is permissive")}
	}
	if module == "" && m.read("sys/module/apparmor/parameters/enabled") == "Y" {
		module = "AppArmor"
	}
	r := m.release()
	affected := !r.Before(6, 11, 0) && r.Before(6, 18, 0) &&
		!(r.Major == 6 && r.Minor == 12 && r.Patch >= 56) && !(r.Major == 6 && r.Minor == 17 && r.Patch >= 6)
	switch {
	case module == "":
		return []Finding{ok("neither SELinux nor AppArmor")}
	case !affected:
		return []Finding{ok("%s, which does not disturb connections on this kernel", module)}
	}
	f := warning("%s, and a kernel (%s) that asks it about connections to the server", module, r.Name)
	return []Finding{f.
		because("a confined program that uses a device, or a file on it, can cost the device its connection " +
			"(Send control failed, result -13)").
		do("a kernel from 6.18 on, 6.17.6 or 6.12.56")}
}
