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
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// TestKernelDoctorLeftovers shows that doctor finds and removes what killed
// processes of nbdctl have left, and nothing of anybody else.
func TestKernelDoctorLeftovers(t *testing.T) {
	requireKernel(t, refusedSocket, orphanNoise)
	// Without identifiers an index could be another's by now, which is for its user to know.
	identifiers := nbdnltest.Identifiers.In(t)
	foreign := stranger(t)
	small := func() string { return connected(t, "memory", "--size", "1M", "--restart", "no") }
	free, held, gone, alive := small(), small(), small(), small()
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
	if err := client.DropAny(t.Context(), index); err != nil {
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
		l := find(d, about(free)...)
		if l.Result != "problem" || l.Fixable != identifiers || *l.Remedy != "nbdctl disconnect "+filepath.Base(free) {
			t.Error(l)
		}
		l = find(d, append(about(held), fmt.Sprintf("process %d", os.Getpid()))...)
		if l.Result != "problem" || l.Fixable {
			t.Error(l)
		}
		if l := find(d, "records of processes that were killed"); l.Result != "warning" || !l.Fixable {
			t.Error(l)
		}
	}

	if !identifiers {
		d := doctorRun(t, "--fix")
		fixed := *find(d, "records of processes").Fixed
		if d.code != exit.Failure || listed(t, free) == nil || fixed != "records removed" {
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
	fixed := *find(d, about(free)...).Fixed
	if d.code != exit.Failure || fixed != filepath.Base(free)+" disconnected" || find(d, about(held)...).Fixed != nil {
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
	dev := connected(t, "memory", "--size", "1M", "--restart", "no")
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
	target := "nbd16"
	if older(t, 6, 1) {
		target = "nbd15" // where none are made
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
		begun := false
		eventually(t, func() bool {
			_, err := os.Stat("/sys/block/" + target + "/pid")
			if connected := err == nil; !begun || connected {
				begun = connected || begun
				return late()
			}
			// Between two of its devices doctor is held for a moment, or the other program would
			// hardly ever be in time. Not for longer, for it may have a claim to the index, which
			// that one then waits for.
			_ = doctor.Process.Signal(syscall.SIGSTOP) // It may have ended.
			connect := begin(t, nbdctlCommand(t, "connect", "memory", "--size", "1M", "--device", target))
			moment := time.NewTimer(time.Second)
			select {
			case other = <-connect:
				_ = doctor.Process.Signal(syscall.SIGCONT)
			case <-moment.C:
				_ = doctor.Process.Signal(syscall.SIGCONT)
				other = <-connect
			}
			moment.Stop()
			return other.code == 0 || late()
		}, "%s for another program", target)
		if other.code != 0 {
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
		l := listed(t, "/dev/"+target)
		if l == nil || l["state"] != "live" || sysfs(t, target, "queue/max_sectors_kb") != "1024" {
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
	requireKernel(t, refusedSocket, openNoise, `I/O error, dev nbd\d+, sector \d+ .*\(READ\)|Buffer I/O error`)
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
	// Of those that doctor makes: on a slow machine a prober of all seldom is at the right one.
	prober := command(t, "sh", "-c", "while :; do for d in /dev/nbd16 /dev/nbd17; do true <$d; done; done 2>/dev/null")
	if err := prober.Start(); err != nil {
		t.Fatal(err)
	}
	stop := func(cmd *exec.Cmd) {
		cmd.Process.Kill()
		cmd.Wait()
	}
	t.Cleanup(func() { stop(holder); stop(prober) })

	d := doctorRun(t)
	// On a machine that is busy the prober may be kept from it for as long as doctor looks.
	for range 5 {
		if older(t, 5, 13) || d.lines["openers"][0].Result == "warning" {
			break
		}
		d = doctorRun(t)
	}
	if d.code != exit.OK {
		t.Errorf("code %d", d.code)
	}
	by := fmt.Sprintf("process %d (sleep)", holder.Process.Pid)
	if !slices.ContainsFunc(d.lines["held"], func(l line) bool {
		return l.Result == "warning" && strings.HasPrefix(l.Seen, "nbd3 is open") && strings.Contains(l.Seen, by)
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
