package main

import (
	"bytes"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/urfave/cli/v2"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
)

func TestPermute(t *testing.T) {
	app := newApp(io.Discard, io.Discard)
	for _, tt := range []struct{ in, want string }{
		{"", ""},
		{"--help", "--help"},
		{"nonsense memory --size 1M", "nonsense memory --size 1M"},
		{"connect --size 1M memory", "connect --size 1M -- memory"},
		{"connect memory --size 1M", "connect --size 1M -- memory"},
		{"connect memory --size=1M --read-only", "connect --size=1M --read-only -- memory"},
		{"connect file a.img --json -o k=v --read-only", "connect --json -o k=v --read-only -- file a.img"},
		{"connect file -- --size", "connect -- file --size"},
		{"connect file - --json", "connect --json -- file -"},
		{"connect memory --size", "connect --size"},
		{"connect memory --unknown x", "connect --unknown -- memory x"},
		{"disconnect nbd1 --force nbd2", "disconnect --force -- nbd1 nbd2"},
		{"resize nbd1 -512M --json", "resize --json -- nbd1 -512M"},
		{"disconnect nbd1 -h", "help disconnect"},
		{"--help disconnect nbd1", "help disconnect nbd1"},
		{"connect --size --help", "connect --size --help --"},
		{"connect -- --help", "connect -- --help"},
	} {
		got := permute(app, strings.Fields(tt.in))
		if diff := cmp.Diff(tt.want, strings.Join(got, " ")); diff != "" {
			t.Errorf("permute(%q):\n%s", tt.in, diff)
		}
	}
}

// TestSpec shows that flags mean the same before and after the backend.
func TestSpec(t *testing.T) {
	index := 5
	want := host.Spec{
		Label: "scratch", Index: &index, Kind: "memory", Options: []string{"limit=1G"}, Size: 512 << 20,
		ReadOnly: true, BlockSize: 4096, Connections: 4, Timeout: 60e9, DeadTimeout: 120e9, Restart: 7,
	}
	const flags = "--name scratch --device /dev/nbd5 -o limit=1G --size 512M --read-only --block-size 4k " +
		"--connections 4 --timeout 60s --dead-timeout 2m --restart 7"
	for _, line := range []string{"connect " + flags + " memory", "connect memory " + flags} {
		if diff := cmp.Diff(want, parse(t, line)); diff != "" {
			t.Errorf("%s:\n%s", line, diff)
		}
	}
}

func TestSpecIoctl(t *testing.T) {
	if !parse(t, "connect memory --size 1M --ioctl").Ioctl {
		t.Error("--ioctl is lost")
	}
}

func TestSpecDefaults(t *testing.T) {
	want := host.Spec{Kind: "file", Arg: "/disk.img", Connections: 1, Timeout: 30e9, DeadTimeout: -1, Restart: 5}
	if diff := cmp.Diff(want, parse(t, "connect file /disk.img")); diff != "" {
		t.Error(diff)
	}
}

// TestSpecRestart shows when a process is replaced that dies.
func TestSpecRestart(t *testing.T) {
	for _, tt := range []struct {
		flags string
		want  int
	}{
		{"", 5}, {"--restart no", 0}, {"--restart 1", 1}, {"--restart 3 --dead-timeout 5s", 3},
		{"--ioctl", 0}, {"--foreground", 0}, {"--dead-timeout 0s", 0}, {"--dead-timeout 1s", 5},
		{"--restart no --foreground", 0},
	} {
		if got := parse(t, "connect memory --size 1M "+tt.flags).Restart; got != tt.want {
			t.Errorf("%s: %d, want %d", tt.flags, got, tt.want)
		}
	}
}

// TestSpecPath shows that a path is made absolute for the serving process.
func TestSpecPath(t *testing.T) {
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	if got, want := parse(t, "connect file a/../disk.img").Arg, filepath.Join(wd, "disk.img"); got != want {
		t.Errorf("the path is %q, want %q", got, want)
	}
}

// parse returns what connect understands.
func parse(t *testing.T, line string) (spec host.Spec) {
	t.Helper()
	app := newApp(io.Discard, io.Discard)
	app.Command("connect").Action = func(c *cli.Context) (err error) {
		spec, err = specOf(c)
		return err
	}
	if err := app.Run(append([]string{"nbdctl"}, permute(app, strings.Fields(line))...)); err != nil {
		t.Fatalf("%s: %v", line, err)
	}
	return spec
}

// TestNoName shows that an empty name, as of a shell's empty variable, means no device.
func TestNoName(t *testing.T) {
	t.Setenv("NBDCTL_STATE_DIR", filepath.Join(t.TempDir(), "state"))
	for _, line := range []string{
		"status", "stats", "kick", "disconnect", "resize - 1M", "reconfigure --timeout 5s -",
	} {
		args := strings.Fields(line)
		if i := slices.Index(args, "-"); i >= 0 {
			args[i] = ""
		} else {
			args = append(args, "")
		}
		var stdout, stderr bytes.Buffer
		if code := run(t.Context(), args, &stdout, &stderr); code != exit.Usage || stderr.Len() == 0 {
			t.Errorf("%q: exit code %d, %s", args, code, &stderr)
		}
	}
}

// TestListDamaged shows that a record which can't be read hides nothing, and is told of.
func TestListDamaged(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("NBDCTL_STATE_DIR", dir)
	record := filepath.Join(dir, "6ba7b810-9dad-11d1-80b4-00c04fd430c8")
	if err := os.Mkdir(record, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(record, "state.json"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	var stdout, stderr bytes.Buffer
	code := run(t.Context(), []string{"list", "--json"}, &stdout, &stderr)
	var devices []map[string]any
	if err := json.Unmarshal(stdout.Bytes(), &devices); code != exit.OK || err != nil || devices == nil {
		t.Errorf("exit code %d, %s, %v", code, &stdout, err)
	}
	if !strings.Contains(stderr.String(), record) {
		t.Errorf("stderr does not name %s: %s", record, &stderr)
	}
}

// TestUsageErrors shows that what is valid on no machine fails before
// anything is touched, with code 2, only on stderr, naming what was wrong.
func TestUsageErrors(t *testing.T) {
	t.Setenv("NBDCTL_STATE_DIR", filepath.Join(t.TempDir(), "state"))
	for _, tt := range []struct{ line, says string }{
		{"", "no command"},
		{"nonsense", `unknown command "nonsense"`},
		{"connect", "no backend named"},
		{"connect nonsense", `unknown backend "nonsense"`},
		{"connect memory", "memory needs --size"},
		{"connect memory x --size 1M", "memory takes no argument"},
		{"connect memory --size 0", "--size 0: must be above zero"},
		{"connect memory --size -1", "--size -1: a size is"},
		{"connect memory --size 1000", "--size 1000: must be a multiple of the block size 512"},
		{"connect memory --size 1000", "the block size 512, as 512 or 1024"},
		{"connect memory --size 100", "the block size 512, as 512"},
		{"connect memory --size 9223372036854775807", "the block size 512, as 9223372036854775296"},
		{"connect memory --size 8E", "a size is below 8 EiB"},
		{"connect memory --size 1M -o limit=8E", "-o limit=8E"},
		{"connect memory --size 6k --block-size 4k", "must be a multiple of the block size 4096"},
		{"connect memory --size 9999999999999999999999", "--size 9999999999999999999999"},
		{"connect memory --size", "size"},
		{"connect memory --size 1M --block-size 256", "--block-size 256: must be a power of two from 512 to 65536"},
		{"connect memory --size 1M --block-size 128k", "--block-size 128k"},
		{"connect memory --size 3M --block-size 3k", "--block-size 3k"},
		{"connect memory --size 1M --connections 0", "--connections 0: must be a number from 1 to 64"},
		{"connect memory --size 1M --connections many", "--connections many"},
		{"connect memory --size 1M --timeout 0", "--timeout 0: a duration is whole seconds from 1s to 24h"},
		{"connect memory --size 1M --timeout 1500ms", "--timeout 1500ms"},
		{
			"connect memory --size 1M --dead-timeout 25h",
			"--dead-timeout 25h: a duration is whole seconds from 0s to 24h",
		},
		{"connect memory --size 1M --ioctl --dead-timeout 1s", "--ioctl: has no --dead-timeout"},
		{"connect memory --size 1M --device sda", "--device sda"},
		{"connect memory --size 1M --name nbd7", "--name nbd7"},
		{"connect memory --size 1M --name 7", "--name 7"},
		{"connect memory --size 1M --name a/b", `--name "a/b"`},
		{"connect memory --size 1M --name=", `--name ""`},
		{"connect memory --size 1M --create", "--create"},
		{"connect memory --size 1M -o nonsense=1", `no option "nonsense"`},
		{"connect memory --size 1M -o limit", "must be key=value"},
		{"connect memory --size 1M -o limit=0", "-o limit=0"},
		{"connect memory --size 1M --nonsense", "nonsense"},
		{"connect file", "file needs a path"},
		{"connect file a b", `"b" is too much`},
		{"connect file a.img -o cache=none", `no option "cache", only direct`},
		{"connect file a.img -o direct=maybe", "-o direct=maybe: must be on or off"},
		{"connect file a.img --create", "--create needs --size"},
		{"connect file a.img --create --size 1M --read-only", "exclude each other"},
		{"serve memory --size 1M", "serve needs --listen"},
		{"serve memory --size 1M --listen /tmp/x", "--listen /tmp/x: must be unix:PATH, tcp:HOST:PORT or vsock:PORT"},
		{"serve memory --size 1M --listen tcp:10809", "missing port"},
		{"serve memory --size 1M --listen unix:", "must be unix:PATH"},
		{"serve memory --size 1M --listen unix:/" + long(107), "has 108 bytes, and the path of a socket at most 107"},
		{"serve memory --size 1M --listen unix:" + long(107), "at most 107"},
		{"serve memory --size 1M --listen unix:\xff", "valid UTF-8"},
		{"serve memory --size 1M --listen unix:/", "/ is a directory"},
		{"serve memory --size 1M --listen unix:app.go", "app.go is a regular file"},
		{"serve memory --size 1M --listen tcp:localhost:99999", "a port is a number from 0 to 65535, not 99999"},
		{"serve memory --size 1M --listen tcp:localhost:-1", "a port is a number from 0 to 65535, not -1"},
		{"serve memory --size 1M --listen tcp:localhost:99999999999999999999", "a port is a number"},
		{"serve memory --size 1M --listen tcp:localhost:", "needs a port"},
		{"serve memory --size 1M --listen tcp:localhost:no-such-service", "is no port"},
		{"serve memory --size 1M --listen tcp:::1:0", "in brackets"},
		{"serve memory --size 1M --listen tcp::0 --listen tcp:x", "missing port"},
		{"serve memory --size 1M --listen vsock:x", "a port is a number from 0 to 4294967294"},
		{"serve memory --size 1M --listen vsock:4294967295", "a port is a number from 0 to 4294967294"},
		{"serve memory --size 1M --listen tcp::0 --tls maybe", "must be off, allow or require"},
		{"serve memory --size 1M --listen tcp::0 --tls require", "needs --tls-certificates"},
		{"serve memory --size 1M --listen tcp::0 --tls-verify-peer", "there is no TLS"},
		{"serve memory --size 1M --listen tcp::0 --tls allow --tls-certificates x --tls-verify-peer", "leave --tls out"},
		{"serve memory --size 1M --listen tcp::0 --tls off --tls-certificates x --tls-verify-peer", "there is no TLS"},
		{"serve memory --size 1M --listen tcp::0 --max-clients 0", "--max-clients 0: must be a number from 1 to"},
		{"serve memory --size 1M --listen tcp::0 --max-per-address many", "must be a number from 1 to"},
		{"serve memory --size 1M --listen tcp::0 --max-memory 0", "must be a size above zero"},
		{"serve memory --size 1M --listen tcp::0 --handshake-timeout 0", "--handshake-timeout 0"},
		{"serve --listen tcp::0 --exports f memory", `leave out "memory"`},
		{"serve --listen tcp::0 --exports f --size 1M", "--size: is for one export"},
		{"serve --listen tcp::0 --exports=", "needs the path of a file"},
		{"serve memory --size 1M --listen tcp:[fe80::1]:0", "[fe80::1%eth0]"},
		{"serve memory --size 1M --listen tcp:127.0.0.1:0 --name " + long(4097), "has 4097 bytes"},
		{"serve memory --size 1M --listen tcp:127.0.0.1:0 --name \xff", "valid UTF-8"},
		{"serve memory --size 1000 --block-size 512 --listen tcp:127.0.0.1:0", "the block size 512, as 512 or 1024"},
		{"serve memory --size 0 --listen tcp:127.0.0.1:0", "above zero"},
		{"serve memory --listen unix:/tmp/x", "memory needs --size"},
		{"list nbd3", "list takes no argument"},
		{"list --nonsense", "nonsense"},
		{"--generate-bash-completion", "generate-bash-completion"},
		{"disconnect nbd3 --generate-bash-completion", "generate-bash-completion"},
		{"status", "status takes one device"},
		{"status nbd1 nbd2", "status takes one device"},
		{"disconnect", "either devices"},
		{"disconnect --all nbd3", "either devices"},
		{"resize nbd3", "resize takes a device and a size"},
		{"resize nbd3 much", "resize nbd3 much: a size is"},
		{"resize nbd3 +-1M", "resize nbd3 +-1M: a size is"},
		{"reconfigure", "reconfigure takes one device"},
		{"reconfigure nbd3", "needs --timeout or --dead-timeout"},
		{"reconfigure nbd3 --timeout 0", "--timeout 0: a duration is whole seconds from 1s to 24h"},
		{"kick", "kick takes one device"},
		{"stats", "stats takes one device"},
		{"stats nbd3 --watch --interval 100ms", "--interval 100ms: a duration is whole seconds from 1s"},
		{"stats nbd3 --interval 2s", "--interval is of use with --watch only"},
		{"watch nbd3", "watch takes no argument"},
	} {
		t.Run(tt.line, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			code := run(t.Context(), strings.Fields(tt.line), &stdout, &stderr)
			if code != exit.Usage {
				t.Errorf("exit code %d, want %d", code, exit.Usage)
			}
			if stdout.Len() != 0 {
				t.Errorf("stdout has %q", &stdout)
			}
			if !strings.Contains(stderr.String(), tt.says) {
				t.Errorf("stderr says %q, want it to contain %q", &stderr, tt.says)
			}
			if _, err := os.Stat(os.Getenv("NBDCTL_STATE_DIR")); !os.IsNotExist(err) {
				t.Errorf("the state directory was made: %v", err)
			}
		})
	}
}

func TestHelp(t *testing.T) {
	for _, line := range []string{"--help", "-h", "help", "connect --help", "help connect", "disconnect --help"} {
		var stdout, stderr bytes.Buffer
		if code := run(t.Context(), strings.Fields(line), &stdout, &stderr); code != exit.OK {
			t.Errorf("%s: exit code %d", line, code)
		}
		if !strings.Contains(stdout.String(), "USAGE") || stderr.Len() != 0 {
			t.Errorf("%s: stdout %q, stderr %q", line, &stdout, &stderr)
		}
		if strings.Contains(stdout.String(), host.Command) {
			t.Errorf("%s shows the hidden command", line)
		}
	}
}
