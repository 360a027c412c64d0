//go:build compat

// These tests need the nbdctl of an older commit, which make test-compat builds.

package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// oldNbdctl in the environment is the path of the older program.
const oldNbdctl = "NBD_TEST_OLD_NBDCTL"

// A program is nbdctl as it was or as it is.
type program struct {
	name string
	run  func(t testing.TB, args ...string) result
}

// programs are both.
func programs(t *testing.T) (older, newer program) {
	t.Helper()
	path := os.Getenv(oldNbdctl)
	if path == "" {
		t.Fatalf("%s names no program: run make test-compat", oldNbdctl)
	}
	old := func(t testing.TB, args ...string) result {
		t.Helper()
		return finish(t, command(t, path, args...))
	}
	return program{"old", old}, program{"new", nbdctl}
}

// must runs the program, which must succeed, and returns its standard output.
func (p program) must(t testing.TB, args ...string) string {
	t.Helper()
	r := p.run(t, args...)
	if r.code != 0 {
		t.Fatalf("the %s nbdctl %s: exit code %d\n%s", p.name, strings.Join(args, " "), r.code, r.stderr)
	}
	return r.stdout
}

// json runs the program and returns what it prints.
func (p program) json(t testing.TB, args ...string) (v any) {
	t.Helper()
	if err := json.Unmarshal([]byte(p.must(t, args...)), &v); err != nil {
		t.Fatal(err)
	}
	return v
}

// TestKernelCompat connects devices by the one program, and lists, changes and disconnects them by
// the other, each way.
func TestKernelCompat(t *testing.T) {
	older, newer := programs(t)
	for _, tt := range []struct {
		name         string
		serves, asks program
	}{{"old serves", older, newer}, {"new serves", newer, older}} {
		for _, flags := range [][]string{nil, {"--ioctl"}} {
			t.Run(tt.name+strings.Join(flags, ""), func(t *testing.T) {
				requireKernel(t)
				compatible(t, tt.serves, tt.asks, flags)
			})
		}
	}
}

// compatible connects by one program and does the rest by the other.
func compatible(t *testing.T, serves, asks program, flags []string) {
	t.Helper()
	image := filepath.Join(imageDir(t), "disk.img")
	connect := func(args ...string) string {
		t.Helper()
		dev := strings.TrimSpace(serves.must(t, append(append([]string{"connect"}, args...), flags...)...))
		t.Cleanup(func() {
			if listed(t, dev) != nil {
				nbdctl(t, "disconnect", "--force", dev)
			}
		})
		return dev
	}
	scratch := connect("memory", "--size", "64M", "--name", "scratch", "-o", "limit=32M", "--timeout", "45s")
	disk := connect("file", image, "--create", "--size", "32M", "--block-size", "1024")
	sh(t, "dd if=/dev/urandom of="+scratch+" bs=64k count=4 oflag=direct status=none")

	both := func(what string, args ...string) {
		t.Helper()
		if diff := cmp.Diff(serves.json(t, args...), asks.json(t, args...)); diff != "" {
			t.Errorf("%s is another to the %s nbdctl (-%s +%[2]s):\n%s", what, asks.name, serves.name, diff)
		}
	}
	both("the list", "list", "--json")
	both("the status", "status", "--json", "scratch")
	if stats, ok := asks.json(t, "stats", "--json", scratch).(map[string]any); !ok ||
		stats["total"].(map[string]any)["write"].(map[string]any)["bytes"] != float64(256<<10) {
		t.Errorf("the stats are %v", stats)
	}
	if got, want := asks.must(t, "resize", "scratch", "+16M"),
		filepath.Base(scratch)+" is 80M (83886080 bytes)\n"; got != want {
		t.Errorf("resize prints %q, want %q", got, want)
	}
	if got := sysfs(t, scratch, "size"); got != "163840" {
		t.Errorf("the kernel shows %s sectors", got)
	}
	asks.must(t, "resize", disk, "16M")
	asks.must(t, "reconfigure", "scratch", "--timeout", "50s")
	both("the changed list", "list", "--json")
	if r := asks.run(t, "resize", disk, "1000"); r.code != 2 {
		t.Errorf("a size that is no multiple: exit code %d, %s", r.code, r.stderr)
	}
	asks.must(t, "disconnect", "scratch")
	asks.must(t, "disconnect", "--all")
	if left := asks.json(t, "list", "--json").([]any); len(left) != 0 {
		t.Errorf("after disconnect there are %v", left)
	}
}

// TestKernelCompatUpgrade upgrades a device of the older program, which can't hand it over, and one
// of the newer with the older, which does not know how.
func TestKernelCompatUpgrade(t *testing.T) {
	requireKernel(t)
	older, newer := programs(t)
	dev := strings.TrimSpace(older.must(t, "connect", "memory", "--size", "1M"))
	r := newer.run(t, "upgrade", dev)
	if r.code != 5 || !strings.Contains(r.stderr, "is served by an nbdctl that can't hand it over") {
		t.Errorf("upgrade: exit code %d, %s", r.code, r.stderr)
	}
	if state := newer.json(t, "status", "--json", dev).(map[string]any)["state"]; state != "live" {
		t.Errorf("the device is %v", state)
	}
	newer.must(t, "disconnect", dev)
}

// TestKernelCompatOrphan kills the serving process of the one, and frees the device by the other.
func TestKernelCompatOrphan(t *testing.T) {
	older, newer := programs(t)
	for _, pair := range [][2]program{{older, newer}, {newer, older}} {
		serves, asks := pair[0], pair[1]
		t.Run(serves.name+" serves", func(t *testing.T) {
			requireKernel(t, orphanNoise)
			connect := []string{"connect", "memory", "--size", "1M"}
			if serves.name == newer.name {
				connect = append(connect, "--restart", "no")
			}
			dev := strings.TrimSpace(serves.must(t, connect...))
			kill(t, dev, syscall.SIGKILL)
			eventually(t, func() bool { // The lock goes with the process.
				return asks.json(t, "status", "--json", dev).(map[string]any)["state"] == "orphaned"
			}, "%s is not orphaned to the %s nbdctl", dev, asks.name)
			asks.must(t, "disconnect", dev)
		})
	}
}

// TestKernelCompatKick ends by the one a device that the other serves and whose process is stopped.
func TestKernelCompatKick(t *testing.T) {
	older, newer := programs(t)
	for _, pair := range [][2]program{{older, newer}, {newer, older}} {
		serves, asks := pair[0], pair[1]
		t.Run(serves.name+" serves", func(t *testing.T) {
			requireKernel(t, orphanNoise+`|shutting down sockets|Send control failed|Request send failed`)
			dev := strings.TrimSpace(serves.must(t, "connect", "memory", "--size", "1M"))
			kill(t, dev, syscall.SIGSTOP)
			asks.must(t, "kick", dev)
			if left := asks.json(t, "list", "--json").([]any); len(left) != 0 {
				t.Errorf("after kick there are %v", left)
			}
		})
	}
}
