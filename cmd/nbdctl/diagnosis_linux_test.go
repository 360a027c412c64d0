package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
)

// refusedSocket is what the kernel says of a kind of socket that doctor tries.
const refusedSocket = `^block nbd\d+: Unsupported socket: should be TCP or UNIX\.$`

const (
	// orphanNoise is what the kernel says when a server is killed.
	orphanNoise = `I/O error|Dead connection|Send disconnect failed|Receive control failed`
	// openNoise is what it says of a device that somebody has open at the
	// moment when it is to be connected.
	openNoise = `^nbd: nbd\d+ already in use$`
)

// A line is what doctor --json says of a check.
type line struct {
	Check, Result, Seen string
	Why, Remedy, Fixed  *string
	Fixable             bool
}

func (l line) String() string {
	return fmt.Sprintf("%s %s: %s; why %s; do %s; fixed %s",
		l.Result, l.Check, l.Seen, orDash(l.Why), orDash(l.Remedy), orDash(l.Fixed))
}

// diagnosis is what doctor found, by the names of the checks.
type diagnosis struct {
	code  exit.Code
	lines map[string][]line
}

// one returns the only line of a check, which must have that result.
func (d diagnosis) one(t *testing.T, check, result string) line {
	t.Helper()
	lines := d.lines[check]
	if len(lines) != 1 || lines[0].Result != result {
		t.Fatalf("%s has %v, want one line that is %s", check, lines, result)
	}
	return lines[0]
}

// says checks that the only line of a check has that result and those words.
func (d diagnosis) says(t *testing.T, check, result string, words ...string) {
	t.Helper()
	l := d.one(t, check, result)
	for _, word := range words {
		if !strings.Contains(l.String(), word) {
			t.Errorf("%v: want %q in it", l, word)
		}
	}
}

// wantHealthy checks that all lines are ok. What a connect costs depends on what
// else the machine that the lab runs on has to do.
func (d diagnosis) wantHealthy(t *testing.T) {
	t.Helper()
	for check, lines := range d.lines {
		for _, l := range lines {
			if l.Result != "ok" && check != "cost" {
				t.Errorf("not ok: %v", l)
			}
		}
	}
}

// examined runs a command that is doctor --json.
func examined(t *testing.T, cmd *exec.Cmd) diagnosis {
	t.Helper()
	r := finish(t, cmd)
	d := diagnosis{exit.Code(r.code), make(map[string][]line)}
	var lines []line
	decoder := json.NewDecoder(strings.NewReader(r.stdout))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&lines); err != nil {
		t.Fatalf("%v: %v\n%s%s", cmd.Args, err, r.stdout, r.stderr)
	}
	for _, l := range lines {
		t.Log(l)
		d.lines[l.Check] = append(d.lines[l.Check], l)
	}
	if (d.code == exit.OK) != (r.stderr == "") {
		t.Errorf("code %d, stderr %q", d.code, r.stderr)
	}
	return d
}

func doctorRun(t *testing.T, args ...string) diagnosis {
	t.Helper()
	return examined(t, nbdctlCommand(t, append([]string{"doctor", "--json"}, args...)...))
}

// within prepares a run of cmd by another command, such as unshare.
func within(cmd *exec.Cmd, by ...string) *exec.Cmd {
	cmd.Args = append(by, cmd.Args...)
	cmd.Path, cmd.Err = exec.LookPath(by[0])
	return cmd
}

// reload has the module loaded as modprobe.d says, and as it was after the test.
func reload(t *testing.T) {
	t.Helper()
	sh(t, "modprobe -r nbd && modprobe nbd")
	if os.Getenv("NBD_LAB") != "" { // which loads it without modprobe.d
		t.Cleanup(func() { sh(t, "modprobe -r nbd && modprobe -C /dev/null nbd") })
	}
}

// sameMachine returns a check that all devices are there, and as they were.
func sameMachine(t *testing.T) (check func()) {
	t.Helper()
	look := func() string {
		return sh(t, `cd /sys/block
for d in nbd*; do
	cd $d
	grep -H . size ro queue/scheduler queue/max_sectors_kb queue/rotational queue/discard_max_bytes \
		queue/write_zeroes_max_bytes queue/minimum_io_size | sed "s/^/$d /"
	cd ..
done`)
	}
	before := look()
	return func() {
		t.Helper()
		if diff := cmp.Diff(before, look()); diff != "" {
			t.Errorf("devices were changed (-before +after):\n%s", diff)
		}
	}
}

// older tells whether the kernel is older than a version.
func older(t *testing.T, major, minor int) bool {
	t.Helper()
	var a, b int
	if _, err := fmt.Sscanf(sh(t, "uname -r"), "%d.%d", &a, &b); err != nil {
		t.Fatal(err)
	}
	return a < major || a == major && b < minor
}
