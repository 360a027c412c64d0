package nbdnltest

import (
	"fmt"
	"os"
	"sync"
	"testing"

	"github.com/nbdctl/nbdctl/nbdnl/machine"
)

// A Feature is something that the drivers of some kernels do and those of others do not. What is so
// on the running kernel is tried out. Where the environment variable NBD_TEST_REQUIRE is 1, as in
// the lab, a test that asks fails if its kernel does not do as its version has been seen to:
// neither is a feature missed that a kernel has, nor one taken for granted that it has not.
type Feature struct {
	name string
	// changes are the kernels in which it came, and went, and came again.
	changes []version
	// config reports whether the kernel is built with what the feature needs besides; nil if it
	// needs nothing.
	config func() bool
	// probe tries it out; nil if it takes a test, which calls Seen, or if that does harm: then the
	// version decides.
	probe func() (bool, error)

	once sync.Once // guards what follows
	has  bool
	err  error
}

// A version is the first two numbers of a kernel's release.
type version struct{ major, minor int }

// before compares versions.
func (v version) before(w version) bool {
	return v.major < w.major || v.major == w.major && v.minor < w.minor
}

// The features. Versions are those of the kernels on which the tests have seen a change, which may
// have come with one in between: they run on 5.10, 6.1, 6.12, 7.2 and 7.3.
var (
	// Identifiers: the kernel keeps the name that a connect gives a device, and shows it in sysfs.
	Identifiers = &Feature{name: "identifiers", changes: []version{{6, 1}}, probe: probeIdentifiers}
	// StreamSockets: a connect refuses sockets that are no streams.
	StreamSockets = &Feature{
		name:    "refusal of sockets that are no streams",
		changes: []version{{6, 1}},
		probe:   probeStreamSockets,
	}
	// PositiveSizes: a connect refuses sizes of 2^63 bytes and more.
	PositiveSizes = &Feature{
		name:    "refusal of sizes from 2^63 bytes on",
		changes: []version{{6, 1}},
		probe:   probePositiveSizes,
	}
	// Waking: a disconnect ends the wait of requests for a new connection. Without, it waits as
	// long as they do, under the lock of all generic netlink: not to be tried out.
	Waking = &Feature{name: "disconnects that end the wait for a connection", changes: []version{{6, 1}}}
	// ForgetsTrim: a device that has ended does not go on to offer the trims of the one before.
	ForgetsTrim = &Feature{
		name:    "trim limits that end with the device",
		changes: []version{{6, 1}, {6, 12}, {7, 3}},
		probe:   probeForgetsTrim,
	}
	// Removal: a device that goes with its last user does not keep other commands waiting. Without,
	// a connect of its index sleeps under the lock of all generic netlink, for good if it is the
	// last user who wants to connect: not to be tried out.
	Removal = &Feature{name: "removal of devices that does not hang", changes: []version{{6, 1}}}
	// ForgetsZeroes: a device whose server does not offer write-zeroes requests has none that the
	// former user's did.
	ForgetsZeroes = &Feature{
		name:    "write-zeroes that end with the device",
		changes: []version{{}, {6, 12}, {7, 3}},
		probe:   probeForgetsZeroes,
	}
	// WriteZeroes: ranges are zeroed by a request of that kind.
	WriteZeroes = &Feature{name: "write-zeroes requests", changes: []version{{6, 12}}, probe: probeWriteZeroes}
	// Rotational: the server can say that its disk rotates.
	Rotational = &Feature{name: "rotational disks", changes: []version{{6, 12}}, probe: probeRotational}
	// Namespaces: the family can be found from every network namespace.
	Namespaces = &Feature{
		name:    "use from other network namespaces",
		changes: []version{{6, 12}},
		probe:   probeNamespaces,
	}
	// Autoload: who asks for the family by its name makes the kernel load the module.
	Autoload = &Feature{name: "loading by the family's name", changes: []version{{6, 12}}}
	// WaitsForRequests: a new size waits for the requests that are in flight.
	WaitsForRequests = &Feature{name: "resizes that wait for requests", changes: []version{{6, 12}}}
	// StickyCache: a cache that an administrator has switched off is off for the next user of the
	// index too.
	StickyCache = &Feature{name: "caches that stay switched off", changes: []version{{6, 12}}}
	// LargeBlocks: blocks may be larger than a page.
	LargeBlocks = &Feature{
		name:    "blocks larger than a page",
		changes: []version{{7, 2}},
		config:  hugePages,
		probe:   probeLargeBlocks,
	}
)

// Features are all that can be asked for.
var Features = []*Feature{
	Identifiers,
	StreamSockets,
	PositiveSizes,
	Removal,
	Waking,
	ForgetsTrim,
	ForgetsZeroes,
	WriteZeroes,
	Rotational,
	Namespaces,
	LargeBlocks,
}

// In reports whether the running kernel has the feature, which it tries out once.
func (f *Feature) In(t testing.TB) bool {
	t.Helper()
	f.once.Do(func() {
		if f.probe != nil {
			f.has, f.err = f.probe()
			return
		}
		f.has, f.err = f.expected()
	})
	if f.err != nil {
		t.Fatalf("trying out %s: %v", f.name, f.err)
	}
	f.check(t, f.has)
	return f.has
}

// Need skips the test on a kernel that does not have the feature.
func (f *Feature) Need(t testing.TB) {
	if !f.In(t) {
		// The lab knows by the words and the file's name that this is no want of its own.
		t.Skipf("n/a: this kernel has no %s", f.name)
	}
}

// Lack skips the test on a kernel that has the feature.
func (f *Feature) Lack(t testing.TB) {
	if f.In(t) {
		t.Skipf("n/a: this kernel has %s", f.name)
	}
}

// Report tells the lab's table whether the running kernel has the feature.
func (f *Feature) Report(t testing.TB) { f.report(t, f.In(t)) }

// Seen takes what a test has found out of the running kernel, and tells the lab's table.
func (f *Feature) Seen(t testing.TB, has bool) {
	t.Helper()
	f.check(t, has)
	f.report(t, has)
}

func (f *Feature) report(t testing.TB, has bool) {
	if has {
		t.Logf("has: %s", f.name)
	} else {
		t.Logf("lacks: %s", f.name)
	}
}

// check fails the test in the lab if that is not what the table above says.
func (f *Feature) check(t testing.TB, has bool) {
	t.Helper()
	if os.Getenv(requireEnv) != "1" {
		return
	}
	expected, err := f.expected()
	if err != nil {
		t.Fatal(err)
	}
	if has != expected {
		t.Errorf("%s: %t, expected %t of this kernel's version", f.name, has, expected)
	}
}

// expected reports whether the running kernel has the feature, by its version.
func (f *Feature) expected() (has bool, err error) {
	running, err := runningVersion()
	if err != nil {
		return false, err
	}
	for _, v := range f.changes {
		if !running.before(v) {
			has = !has
		}
	}
	return has && (f.config == nil || f.config()), nil
}

// runningVersion returns the version of the running kernel.
func runningVersion() (v version, err error) {
	r := machine.Root("").Release()
	if !r.Known() {
		return version{}, fmt.Errorf("the kernel's release %q is not a number", r.Name)
	}
	return version{r.Major, r.Minor}, nil
}

// hugePages reports whether the kernel has transparent huge pages, and with them blocks that need
// more than one page (BLK_MAX_BLOCK_SIZE).
func hugePages() bool {
	_, err := os.Stat("/sys/kernel/mm/transparent_hugepage")
	return err == nil
}
