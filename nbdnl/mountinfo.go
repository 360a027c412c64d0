package nbdnl

import "strings"

// A mount is one line of /proc/pid/mountinfo, as far as it matters here.
type mount struct {
	number string // the file system's device number: "43:96"
	point  string // where it is mounted
	source string // what the mounter named as the device
}

// parseMount reads a line of mountinfo (proc_pid_mountinfo(5)): id, parent, device number, root, mount
// point, options, any number of optional fields, "-", type, source, options.
func parseMount(line string) (mount, bool) {
	head, tail, ok := strings.Cut(line, " - ")
	fields, rest := strings.Fields(head), strings.Fields(tail)
	if !ok || len(fields) < 6 || len(rest) < 2 {
		return mount{}, false
	}
	return mount{number: fields[2], point: unescape(fields[4]), source: unescape(rest[1])}, true
}

// unescape undoes the kernel's way (mangle_path) to write blanks and backslashes in paths: \040.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) && isOctal(s[i+1:i+4]) && s[i+1] <= '3' {
			b.WriteByte((s[i+1]-'0')<<6 | (s[i+2]-'0')<<3 | (s[i+3] - '0'))
			i += 3
			continue
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

func isOctal(s string) bool {
	for i := range len(s) {
		if s[i] < '0' || s[i] > '7' {
			return false
		}
	}
	return true
}
