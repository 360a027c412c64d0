package machine

import (
	"os"
	"slices"
	"strconv"
	"strings"
)

// A Release is a kernel's version.
type Release struct {
	// Name is what the kernel calls itself, such as "6.1.0-31-amd64". It is empty where that can't
	// be read.
	Name string
	// Major, Minor and Patch are the numbers at the beginning of the name, and 0 where there is
	// none.
	Major, Minor, Patch int
}

// Release returns the version of the machine's kernel.
func (r Root) Release() Release {
	b, err := os.ReadFile(r.Path("proc/sys/kernel/osrelease"))
	if err != nil {
		return Release{}
	}
	return ParseRelease(strings.TrimSuffix(string(b), "\n"))
}

// ParseRelease returns the version that a kernel of that name has. A name that does not begin with
// a number has none.
func ParseRelease(name string) Release {
	r := Release{Name: name}
	rest := name
	for _, n := range []*int{&r.Major, &r.Minor, &r.Patch} {
		digits := rest
		if i := strings.IndexFunc(rest, func(c rune) bool { return c < '0' || c > '9' }); i >= 0 {
			digits = rest[:i]
		}
		value, err := strconv.Atoi(digits)
		if err != nil {
			break
		}
		*n = value
		if rest = rest[len(digits):]; !strings.HasPrefix(rest, ".") {
			break
		}
		rest = rest[1:]
	}
	return r
}

// Known reports whether the version could be read.
func (r Release) Known() bool { return r.Major != 0 }

// Before reports whether the kernel is older than a version. One that is not known is older than
// all.
func (r Release) Before(major, minor, patch int) bool {
	return slices.Compare([]int{r.Major, r.Minor, r.Patch}, []int{major, minor, patch}) < 0
}
