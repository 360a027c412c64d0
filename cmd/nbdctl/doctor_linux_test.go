package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
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
	return fmt.Sprintf("%s %s: %s; why %s; do %s; fixed %s", l.Result, l.Check, l.Seen, orDash(l.Why), orDash(l.Remedy), orDash(l.Fixed))
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
		return sh(t, `cd /sys/block; for d in nbd*; do cd $d; grep -H . size ro queue/scheduler queue/max_sectors_kb queue/rotational queue/discard_max_bytes queue/write_zeroes_max_bytes queue/minimum_io_size | sed "s/^/$d /"; cd ..; done`)
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

// TestKernelDoctorHealthy shows that on a machine on which nothing is wrong
// doctor finds so, and that what it says of the machine is true.
func TestKernelDoctorHealthy(t *testing.T) {
	requireKernel(t, refusedSocket)
	reload(t)
	identifiers := nbdnltest.Identifiers.In(t) // which is found out on devices
	same := sameMachine(t)
	all := listJSON(t, "--all")
	log := openKernelLog(t)
	d := doctorRun(t)
	same()
	refused := 0
	log.lines(t, func(line string) {
		if strings.Contains(line, "Unsupported socket") {
			refused++
		}
	})
	if d.code != exit.OK {
		t.Errorf("code %d", d.code)
	}
	if os.Getenv("NBD_LAB") != "" && identifiers {
		d.wantHealthy(t)
	}
	d.says(t, "kernel", "ok", sh(t, "uname -r"))
	parameter := func(name string) string { return name + "=" + sh(t, "cat /sys/module/nbd/parameters/"+name) }
	d.says(t, "parameters", "ok", parameter("nbds_max"), parameter("max_part"))
	d.says(t, "nodes", "ok", fmt.Sprintf("%d devices, %s to %s", len(all), all[0]["path"], all[len(all)-1]["path"]))
	d.says(t, "devices", "ok", "0 of nbdctl, 0 of other programs")
	d.says(t, "sockets", "ok", "takes Unix stream, TCP")
	if says := strings.Contains(d.lines["sockets"][0].Seen, "refuses"); says != (refused == 1) {
		t.Errorf("the kernel refused %d sockets, doctor says %s", refused, d.lines["sockets"][0].Seen)
	}

	// What a device of nbdctl has, doctor has seen.
	dev := connected(t, "memory", "--size", "1M", "--connections", "1")
	features := strings.ToLower(d.lines["features"][0].Seen)
	for _, f := range statusOf(t, dev)["features"].([]any) {
		if has, lacks, _ := strings.Cut(features, "; not in this kernel:"); !strings.Contains(has, f.(string)) || strings.Contains(lacks, f.(string)) {
			t.Errorf("a device has %s, doctor says %s", f, features)
		}
	}
	if has := statusOf(t, dev)["identifier"] != nil; has != strings.Contains(strings.Split(features, "; not in")[0], "identifiers") {
		t.Errorf("an identifier shows: %v; doctor says %s", has, features)
	}
	must(t, "disconnect", dev)
	large := nbdctl(t, "connect", "memory", "--size", "1M", "--block-size", "64k")
	if (large.code == 0) != strings.Contains(features, "blocks of 512 to 65536 bytes") {
		t.Errorf("blocks of 64 KiB: code %d, doctor says %s", large.code, features)
	}
	if large.code == 0 {
		must(t, "disconnect", "--all")
	}
	for range 2 {
		text := must(t, "doctor")
		if strings.Count(text, "\n") < len(d.lines) || !strings.HasPrefix(text, "ok       kernel      Linux ") {
			t.Errorf("doctor prints\n%s", text)
		}
	}
}

// TestKernelDoctorModule shows what doctor says without the module, that it
// does not load it unasked, and that it does if asked.
func TestKernelDoctorModule(t *testing.T) {
	requireKernel(t, refusedSocket)
	reload(t)
	sh(t, "modprobe -r nbd")
	t.Cleanup(func() { sh(t, "modprobe nbd") })
	loaded := func() bool { _, err := os.Stat("/sys/module/nbd"); return err == nil }

	d := doctorRun(t)
	d.says(t, "module", "warning", "not loaded", "modprobe nbd")
	if loaded() || d.code != exit.OK || !d.one(t, "module", "warning").Fixable {
		t.Errorf("loaded %t, code %d, %v", loaded(), d.code, d.lines["module"])
	}
	for _, check := range []string{"parameters", "control", "nodes", "device", "features", "sockets", "openers", "cost"} {
		d.says(t, check, "unknown", "needs the nbd module")
	}

	// Without one to load: neither for us nor for the kernel itself.
	const helper = "/proc/sys/kernel/modprobe"
	was := sh(t, "cat "+helper)
	sh(t, "echo /bin/false >"+helper)
	none := []string{"unshare", "--mount", "sh", "-ec", `mount -t tmpfs none /lib/modules/$(uname -r); exec "$0" "$@"`}
	absent := examined(t, within(nbdctlCommand(t, "doctor", "--json", "--fix"), none...))
	connect := finish(t, within(nbdctlCommand(t, "connect", "memory", "--size", "1M"), none...))
	sh(t, "echo "+was+" >"+helper)
	if l := absent.one(t, "module", "problem"); l.Fixable || l.Remedy == nil || absent.code != exit.Unsupported || connect.code != int(exit.Unsupported) {
		t.Errorf("without a module doctor exits with %d, connect with %d; %v", absent.code, connect.code, l)
	}
	if loaded() {
		t.Fatal("it is loaded by now")
	}

	d = doctorRun(t, "--fix")
	if l := d.one(t, "module", "ok"); l.Fixed == nil || *l.Fixed != "modprobe nbd" || !loaded() || d.code != exit.OK {
		t.Errorf("loaded %t, code %d, %v", loaded(), d.code, l)
	}
	d.says(t, "device", "ok", "connected")
}

// TestKernelDoctorOptions follows doctor's advice about a parameter that does
// not exist.
func TestKernelDoctorOptions(t *testing.T) {
	if os.Getenv("NBD_LAB") == "" {
		t.Log("not in the lab: /run/modprobe.d is the machine's, and is put back")
	}
	requireKernel(t, refusedSocket, `unknown parameter .max_dev. ignored`)
	sh(t, "mkdir -p /run/modprobe.d; echo 'options nbd max_dev=20' >/run/modprobe.d/zz-nbd-test.conf")
	t.Cleanup(func() { sh(t, "rm /run/modprobe.d/zz-nbd-test.conf; modprobe -r nbd && modprobe nbd") })
	reload(t)
	d := doctorRun(t)
	l := d.one(t, "options", "warning")
	if !strings.Contains(l.Seen, "max_dev=20 in /run/modprobe.d/zz-nbd-test.conf") || sh(t, "cat /sys/module/nbd/parameters/nbds_max") != "16" {
		t.Error(l)
	}
	sh(t, *l.Remedy)
	if n := sh(t, "ls -d /sys/block/nbd* | wc -l"); n != "20" {
		t.Errorf("after %s there are %s devices", *l.Remedy, n)
	}
	doctorRun(t).says(t, "options", "ok", "nbds_max=20")
}

// TestKernelDoctorUnprivileged shows what doctor says to a user without
// privileges, and that it is the rest of the truth.
func TestKernelDoctorUnprivileged(t *testing.T) {
	requireKernel(t, orphanNoise)
	reload(t)
	dev := connected(t, "memory", "--size", "1M")
	same := sameMachine(t)
	d := examined(t, commandAs(t, nobody, "doctor", "--json"))
	same()
	connect := finish(t, commandAs(t, nobody, "connect", "memory", "--size", "1M"))
	if d.code != exit.Permission || connect.code != int(exit.Permission) {
		t.Errorf("doctor exits with %d, connect with %d", d.code, connect.code)
	}
	d.says(t, "capability", "problem", "CAP_SYS_ADMIN is missing", "sudo")
	for _, check := range []string{"device", "features", "sockets", "openers", "cost"} {
		d.says(t, check, "unknown", "needs CAP_SYS_ADMIN")
	}
	d.says(t, "control", "ok", "netlink answers")
	d.says(t, "devices", "ok", "1 of nbdctl, 0 of other programs")
	d.says(t, "leftovers", "ok")

	// Whoever is root in a user namespace of their own is no more than that.
	contained := examined(t, within(nbdctlCommand(t, "doctor", "--json"), "unshare", "--user", "--map-root-user"))
	contained.says(t, "capability", "problem", "not in the first user namespace")

	kill(t, dev, syscall.SIGKILL)
	eventually(t, func() bool { return listed(t, dev)["state"] == "orphaned" }, "%s orphaned", dev)
	fix := finish(t, commandAs(t, nobody, "doctor", "--fix", "--json"))
	if fix.code != int(exit.Permission) || fix.stdout != "" || !strings.Contains(fix.stderr, "CAP_SYS_ADMIN") || listed(t, dev) == nil {
		t.Errorf("--fix exits with %d: %s%s", fix.code, fix.stdout, fix.stderr)
	}
	must(t, "disconnect", dev)
}

// TestKernelDoctorNetworkNamespace shows what doctor says in a network
// namespace in which old kernels do not show the driver.
func TestKernelDoctorNetworkNamespace(t *testing.T) {
	requireKernel(t, refusedSocket)
	reload(t)
	same := sameMachine(t)
	d := examined(t, within(nbdctlCommand(t, "doctor", "--json"), "unshare", "--net"))
	same()
	connect := finish(t, within(nbdctlCommand(t, "connect", "memory", "--size", "1M"), "unshare", "--net"))
	if int(d.code) != connect.code {
		t.Errorf("doctor exits with %d, connect with %d: %s", d.code, connect.code, connect.stderr)
	}
	if connect.code == 0 {
		must(t, "disconnect", strings.TrimSpace(connect.stdout))
	}
	d.says(t, "control", "warning", "namespace", "do nsenter --net=/proc/1/ns/net nbdctl")
	if byIoctl := strings.Contains(connect.stderr, "by ioctls"); byIoctl != strings.Contains(d.lines["control"][0].String(), "by ioctls") {
		t.Errorf("connect says %q, doctor %v", connect.stderr, d.lines["control"])
	}
	d.says(t, "device", "ok", "was connected")
	// The remedy takes us out of it.
	remedied := examined(t, within(nbdctlCommand(t, "doctor", "--json"), "unshare", "--net", "nsenter", "--net=/proc/1/ns/net"))
	remedied.says(t, "control", "ok", "netlink answers")
}

// TestKernelDoctorLeftovers shows that doctor finds and removes what killed
// processes of nbdctl have left, and nothing of anybody else.
func TestKernelDoctorLeftovers(t *testing.T) {
	requireKernel(t, refusedSocket, orphanNoise)
	// Without identifiers an index could be another's by now, which is for its user to know.
	identifiers := nbdnltest.Identifiers.In(t)
	foreign := stranger(t)
	free, held, gone := connected(t, "memory", "--size", "1M"), connected(t, "memory", "--size", "1M"), connected(t, "memory", "--size", "1M")
	alive := connected(t, "memory", "--size", "1M")
	holder, err := os.Open(held)
	if err != nil {
		t.Fatal(err)
	}
	defer holder.Close()
	pids := make(map[string]int)
	for _, dev := range []string{free, held, gone} {
		pids[dev] = kill(t, dev, syscall.SIGKILL)
		eventually(t, func() bool { return listed(t, dev)["state"] == "orphaned" }, "%s orphaned", dev)
	}
	client, err := nbdnl.New()
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	index, err := nbdnl.ParseIndex(gone)
	if err != nil {
		t.Fatal(err)
	}
	if err := client.DisconnectAny(t.Context(), index); err != nil {
		t.Fatal(err)
	}

	find := func(d diagnosis, words ...string) line {
		t.Helper()
		for _, l := range d.lines["leftovers"] {
			if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(l.Seen, w) }) {
				return l
			}
		}
		t.Fatalf("nothing about %v in %v", words, d.lines["leftovers"])
		return line{}
	}
	about := func(dev string) []string {
		return []string{filepath.Base(dev) + " is orphaned", fmt.Sprintf("pid %d", pids[dev])}
	}
	for range 2 { // for looking changes nothing
		d := doctorRun(t)
		if d.code != exit.Failure || len(d.lines["leftovers"]) != 3 {
			t.Errorf("code %d, %v", d.code, d.lines["leftovers"])
		}
		if l := find(d, about(free)...); l.Result != "problem" || l.Fixable != identifiers || *l.Remedy != "nbdctl disconnect "+filepath.Base(free) {
			t.Error(l)
		}
		if l := find(d, append(about(held), fmt.Sprintf("process %d", os.Getpid()))...); l.Result != "problem" || l.Fixable {
			t.Error(l)
		}
		if l := find(d, "records of processes that were killed"); l.Result != "warning" || !l.Fixable {
			t.Error(l)
		}
	}

	if !identifiers {
		if d := doctorRun(t, "--fix"); d.code != exit.Failure || listed(t, free) == nil || *find(d, "records of processes").Fixed != "records removed" {
			t.Errorf("code %d, %v", d.code, d.lines["leftovers"])
		}
		must(t, "disconnect", free)
		holder.Close()
		must(t, "disconnect", held)
		doctorRun(t).says(t, "leftovers", "ok")
		must(t, "disconnect", alive)
		return
	}
	d := doctorRun(t, "--fix")
	if d.code != exit.Failure || *find(d, about(free)...).Fixed != filepath.Base(free)+" disconnected" || find(d, about(held)...).Fixed != nil {
		t.Errorf("code %d, %v", d.code, d.lines["leftovers"])
	}
	if *find(d, "records of processes").Fixed != "records removed" {
		t.Error(d.lines["leftovers"])
	}
	var left []string
	for _, l := range listJSON(t) {
		left = append(left, l["path"].(string)+" "+l["state"].(string))
	}
	want := []string{foreign + " live", held + " orphaned", alive + " live"}
	slices.Sort(left)
	slices.Sort(want)
	if diff := cmp.Diff(want, left); diff != "" {
		t.Errorf("after --fix (-want +got):\n%s", diff)
	}

	holder.Close()
	d = doctorRun(t, "--fix")
	if d.code != exit.OK || *find(d, about(held)...).Fixed != filepath.Base(held)+" disconnected" {
		t.Errorf("code %d, %v", d.code, d.lines["leftovers"])
	}
	doctorRun(t, "--fix").says(t, "leftovers", "ok", "has left anything", "fixed -")
	if listed(t, foreign) == nil || listed(t, alive) == nil {
		t.Error("it took a device that was no leftover")
	}
	must(t, "disconnect", alive)
}

// TestKernelDoctorBlind shows that without /sys, where no device shows, doctor
// does not take records for those of devices that are gone.
func TestKernelDoctorBlind(t *testing.T) {
	requireKernel(t, refusedSocket, orphanNoise)
	dev := connected(t, "memory", "--size", "1M")
	pid := kill(t, dev, syscall.SIGKILL)
	eventually(t, func() bool { return listed(t, dev)["state"] == "orphaned" }, "%s orphaned", dev)
	records := func() string { return sh(t, "cat $NBDCTL_STATE_DIR/*/state.json") }
	before := records()
	blind := inside(t, "--mount", `mount -t tmpfs none /sys; nbdctl doctor --fix --json`)
	if !strings.Contains(blind.stdout, "whether there are devices can't be seen") || blind.code == 0 {
		t.Errorf("code %d: %s%s", blind.code, blind.stdout, blind.stderr)
	}
	if diff := cmp.Diff(before, records()); diff != "" || !strings.Contains(before, fmt.Sprint(pid)) {
		t.Errorf("the records of pid %d (-before +after):\n%s", pid, diff)
	}
	must(t, "disconnect", dev)
}

// TestKernelDoctorTaken shows that doctor goes on elsewhere when another program
// gets the index that it makes devices on, and leaves it that index.
func TestKernelDoctorTaken(t *testing.T) {
	requireKernel(t, refusedSocket, openNoise)
	reload(t)
	target, made := "nbd16", true
	if older(t, 6, 1) {
		target, made = "nbd15", false // where none are made
	}
	var other result
	for range 5 {
		doctor := nbdctlCommand(t, "doctor", "--json")
		var out lockedBuffer
		doctor.Stdout = &out
		if err := doctor.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan struct{})
		var doctorErr error
		go func() { doctorErr = doctor.Wait(); close(ended) }()
		late := func() bool {
			select {
			case <-ended:
				return true
			default:
				return false
			}
		}
		other.code = -1
		eventually(t, func() bool {
			if _, err := os.Stat("/sys/block/" + target); err == nil && (made || listed(t, "/dev/"+target) != nil) {
				other = nbdctl(t, "connect", "memory", "--size", "1M", "--device", target)
			}
			return other.code == 0 || late()
		}, "%s for another program", target)
		if late() {
			if other.code == 0 {
				must(t, "disconnect", target)
			}
			reload(t)
			continue
		}
		if <-ended; doctorErr != nil {
			t.Errorf("doctor: %v\n%s", doctorErr, out.String())
		}
		var lines []line
		if err := json.Unmarshal([]byte(out.String()), &lines); err != nil {
			t.Fatal(err)
		}
		for _, l := range lines {
			t.Log(l)
			tried := slices.Contains([]string{"device", "sockets"}, l.Check)
			if l.Result == "problem" || tried && l.Result != "ok" || strings.Contains(l.Seen, "busy") {
				t.Error(l)
			}
		}
		if l := listed(t, "/dev/"+target); l == nil || l["state"] != "live" || sh(t, "cat /sys/block/"+target+"/queue/max_sectors_kb") != "1024" {
			t.Errorf("the other program's device is %v", l)
		}
		if _, err := os.Stat("/sys/block/nbd17"); err == nil {
			t.Error("doctor has left nbd17")
		}
		must(t, "disconnect", target)
		return
	}
	t.Error("no other program has got the index")
}

// TestKernelDoctorOpener shows that doctor finds who opens devices of others.
func TestKernelDoctorOpener(t *testing.T) {
	// The prober never rests, and so reads from devices that are ending.
	requireKernel(t, refusedSocket, openNoise, `I/O error, dev nbd\d+, sector 0 .*\(READ\)|Buffer I/O error`)
	reload(t)
	holder := command(t, "sleep", "1000")
	var err error
	if holder.Stdin, err = os.Open("/dev/nbd3"); err != nil {
		t.Fatal(err)
	}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	holder.Stdin.(*os.File).Close()
	prober := command(t, "sh", "-c", "while :; do for d in /dev/nbd1?; do : <$d; done; done 2>/dev/null")
	if err := prober.Start(); err != nil {
		t.Fatal(err)
	}
	stop := func(cmd *exec.Cmd) {
		cmd.Process.Kill()
		cmd.Wait()
	}
	t.Cleanup(func() { stop(holder); stop(prober) })

	d := doctorRun(t)
	if d.code != exit.OK {
		t.Errorf("code %d", d.code)
	}
	if !slices.ContainsFunc(d.lines["held"], func(l line) bool {
		return l.Result == "warning" && strings.HasPrefix(l.Seen, "nbd3 is open") && strings.Contains(l.Seen, fmt.Sprintf("process %d (sleep)", holder.Process.Pid))
	}) {
		t.Errorf("held: %v", d.lines["held"])
	}
	if older(t, 5, 13) {
		d.says(t, "openers", "unknown", "needs a kernel from 5.13 on")
	} else {
		d.says(t, "openers", "warning", fmt.Sprintf("sh (pid %d)", prober.Process.Pid))
	}
	d.says(t, "device", "ok", "connected")

	stop(prober)
	stop(holder)
	d = doctorRun(t)
	d.says(t, "held", "ok")
	if os.Getenv("NBD_LAB") != "" && !older(t, 5, 13) {
		d.says(t, "openers", "ok", "nobody")
	}
}

// TestKernelDoctorUdev follows doctor's advice about a real systemd-udevd.
func TestKernelDoctorUdev(t *testing.T) {
	udevd, err := filepath.Abs("../../testdata/lab/udevd")
	if err != nil {
		t.Fatal(err)
	}
	requireKernel(t, refusedSocket, openNoise)
	reload(t)
	sh(t, udevd+" start")
	defer sh(t, udevd+" stop")
	d := doctorRun(t)
	d.says(t, "udev", "warning", "60-block.rules", "udevadm control --reload")
	if !older(t, 5, 13) {
		d.says(t, "openers", "ok", "udev", "for whom nbdctl waits")
	}
	_, remedy, _ := strings.Cut(*d.lines["udev"][0].Remedy, "often: ")
	// The lab's /etc can't be written.
	sh(t, "mkdir -p /run/udev/rules.d; "+strings.ReplaceAll(remedy, "/etc/", "/run/"))
	defer sh(t, "rm /run/udev/rules.d/61-nbd.rules")
	doctorRun(t).says(t, "udev", "ok", "does not watch nbd devices (/run/udev/rules.d/61-nbd.rules)")

	dev := connected(t, "memory", "--size", "1M")
	sh(t, "udevadm settle")
	seen := command(t, "udevadm", "monitor", "--udev", "--subsystem-match=block")
	var out lockedBuffer
	seen.Stdout = &out
	if err := seen.Start(); err != nil {
		t.Fatal(err)
	}
	out.await(t, "UDEV - the event")
	sh(t, "dd if=/dev/zero of="+dev+" bs=4k count=1 status=none")
	sh(t, "udevadm trigger --action=change /sys/block/nbd15 && udevadm settle") // after which one of the write would have come, too
	out.await(t, "nbd15")
	if strings.Contains(out.String(), filepath.Base(dev)+" ") {
		t.Errorf("udev still watches:\n%s", out.String())
	}
	seen.Process.Kill()
	seen.Wait()
	must(t, "disconnect", dev)
}
