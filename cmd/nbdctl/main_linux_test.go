package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/kind"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// runAsNbdctl in the environment makes the test binary be nbdctl, so that the
// kernel tests run the program as its user does, background process and all.
const runAsNbdctl = "NBDCTL_TEST_RUN"

func TestMain(m *testing.M) {
	kind.All = append(kind.All, vaultKind, fragileKind)
	if os.Getenv(runAsNbdctl) != "" {
		runCommand()
	}
	// A test run in the background ignores them, and so would all that tests start
	// and interrupt. What a program handles itself, those it executes do not inherit.
	for _, s := range []os.Signal{syscall.SIGINT, syscall.SIGHUP} {
		if signal.Ignored(s) {
			signal.Notify(make(chan os.Signal, 1), s)
		}
	}
	os.Exit(nbdnltest.Main(m))
}

// patience bounds every command of the kernel tests: far more than any needs
// on the slowest lab, and less than the test run's own limit.
const patience = 2 * time.Minute

// A result is what a finished command left.
type result struct {
	code           int
	stdout, stderr string
}

// command prepares a command that ends with the test or after patience.
func command(t testing.TB, name string, args ...string) *exec.Cmd {
	t.Helper()
	return commandFor(t, patience, name, args...)
}

func commandFor(t testing.TB, patience time.Duration, name string, args ...string) *exec.Cmd {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), patience)
	t.Cleanup(cancel)
	return exec.CommandContext(ctx, name, args...)
}

// nbdctlCommand prepares a run of nbdctl.
func nbdctlCommand(t testing.TB, args ...string) *exec.Cmd {
	t.Helper()
	return selfCommand(t, patience, args...)
}

// selfCommand prepares a run of this binary as something else than a test.
func selfCommand(t testing.TB, patience time.Duration, args ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := commandFor(t, patience, self, args...)
	cmd.Env = append(os.Environ(), runAsNbdctl+"=1")
	return cmd
}

// finish runs cmd to its end.
func finish(t testing.TB, cmd *exec.Cmd) result {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	// A device's process must not keep our pipes open.
	cmd.WaitDelay = 10 * time.Second
	err := cmd.Run()
	var status *exec.ExitError
	if err != nil && !errors.As(err, &status) {
		t.Fatalf("%v: %v\n%s", cmd.Args, err, &stderr)
	}
	return result{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// nbdctl runs nbdctl. What only looks needs no process of its own, which takes a third of a second
// to start in the lab.
func nbdctl(t testing.TB, args ...string) result {
	t.Helper()
	if len(args) == 0 || args[0] != "list" && args[0] != "status" {
		return finish(t, nbdctlCommand(t, args...))
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), patience)
	defer cancel()
	var stdout, stderr bytes.Buffer
	code := run(ctx, args, &stdout, &stderr)
	return result{int(code), stdout.String(), stderr.String()}
}

// must runs nbdctl, which must succeed, and returns its standard output.
func must(t testing.TB, args ...string) string {
	t.Helper()
	r := nbdctl(t, args...)
	if r.code != int(exit.OK) {
		t.Fatalf("nbdctl %s: exit code %d\n%s", strings.Join(args, " "), r.code, r.stderr)
	}
	return r.stdout
}

// sh runs a shell script, which must succeed, and returns what it printed.
func sh(t testing.TB, script string) string {
	t.Helper()
	r := finish(t, command(t, "sh", "-ec", script))
	if r.code != 0 {
		t.Fatalf("exit code %d from: %s\n%s%s", r.code, script, r.stdout, r.stderr)
	}
	return strings.TrimSpace(r.stdout)
}

// connected connects a device, registers its end, and returns its path.
func connected(t testing.TB, args ...string) string {
	t.Helper()
	path := strings.TrimSuffix(must(t, append([]string{"connect"}, args...)...), "\n")
	if !strings.HasPrefix(path, "/dev/nbd") || strings.Contains(path, "\n") {
		t.Fatalf("connect prints %q, want the device path alone", path)
	}
	t.Cleanup(func() {
		if listed(t, path) != nil {
			nbdctl(t, "disconnect", "--force", path)
		}
	})
	return path
}

// listJSON returns what list --json prints, as a script would read it.
func listJSON(t testing.TB, args ...string) []map[string]any {
	t.Helper()
	var devices []map[string]any
	if err := json.Unmarshal([]byte(must(t, append([]string{"list", "--json"}, args...)...)), &devices); err != nil {
		t.Fatal(err)
	}
	if devices == nil {
		t.Fatal("list --json prints null, want an array")
	}
	return devices
}

// listed returns the device at path as list --json shows it, or nil.
func listed(t testing.TB, path string) map[string]any {
	t.Helper()
	for _, d := range listJSON(t) {
		if d["path"] == path {
			return d
		}
	}
	return nil
}

// statusOf returns what status --json prints.
func statusOf(t testing.TB, device string) map[string]any {
	t.Helper()
	var v map[string]any
	if err := json.Unmarshal([]byte(must(t, "status", "--json", device)), &v); err != nil {
		t.Fatal(err)
	}
	return v
}

// sysfs reads an attribute of the device at path.
func sysfs(t testing.TB, path, attribute string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(path), attribute))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

// requireKernel prepares a kernel test: a state directory of its own, and at
// the end a look at what must not be there: devices, processes, state, and
// lines in the kernel's log other than those that allowed matches.
func requireKernel(t testing.TB, allowed ...string) {
	t.Helper()
	nbdnltest.RequireKernel(t)
	dir := stateDir(t)
	t.Setenv("NBDCTL_STATE_DIR", dir)
	log := openKernelLog(t)
	t.Cleanup(func() {
		for _, d := range listJSON(t) {
			name := d["name"].(string)
			path, _ := statusOf(t, name)["log"].(string)
			log, _ := os.ReadFile(path)
			t.Errorf("still connected: %v\n%s", d, log)
			// One leak should fail one test. A process that hangs or is stopped keeps its device
			// until a kick ends it.
			nbdctl(t, "disconnect", "--force", name)
			if listed(t, d["path"].(string)) != nil {
				nbdctl(t, "kick", name)
			}
		}
		// A process is there for a moment longer than its device.
		for patience := time.Now().Add(5 * time.Second); time.Now().Before(patience); {
			if len(serving(t, dir)) == 0 && len(files(t, dir)) == 0 {
				break
			}
			<-time.After(10 * time.Millisecond)
		}
		if left := serving(t, dir); len(left) != 0 {
			t.Errorf("still running: %v", left)
		}
		if left := files(t, dir); len(left) != 0 {
			t.Errorf("still in the state directory: %v", left)
		}
		log.check(t, allowed)
	})
}

// stateDir makes a state directory that, like the default one, everybody can
// read (t.TempDir is below one that only its owner can enter).
func stateDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbdctl-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// serving lists the processes that serve devices under the state directory.
func serving(t testing.TB, dir string) []string {
	t.Helper()
	return named(t, dir, "nbdctl")
}

// named returns the processes of that name with dir as their state directory.
func named(t testing.TB, dir, name string) (found []string) {
	t.Helper()
	environs, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range environs {
		proc := filepath.Dir(path)
		env, _ := os.ReadFile(path)
		comm, _ := os.ReadFile(filepath.Join(proc, "comm"))
		variables := strings.Split(string(env), "\x00")
		if strings.TrimSpace(string(comm)) == name && slices.Contains(variables, "NBDCTL_STATE_DIR="+dir) {
			found = append(found, filepath.Base(proc))
		}
	}
	return found
}

// files lists all files, not directories, below dir.
func files(t testing.TB, dir string) (found []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			found = append(found, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// imageDir is a directory on a file system that can do what real ones can
// (the lab's root cannot).
func imageDir(t testing.TB) string {
	t.Helper()
	parent := os.Getenv("NBD_LAB_DISK")
	if parent == "" {
		return t.TempDir()
	}
	dir, err := os.MkdirTemp(parent, "test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}
