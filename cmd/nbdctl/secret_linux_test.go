package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/nbdctl/nbdctl/backends/memory"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/kind"
)

// vaultKind is a backend with a secret, which nbdctl has in tests alone. Its first bytes are the
// secret's SHA-256, and it tells the secret wherever it can: in a warning, in the errors of its
// second half, and in that of opening it with fail=on.
var vaultKind = kind.Kind{
	Name:    "vault",
	Options: []string{"key", "fail"},
	Secrets: []string{"key"},
	Check:   func(host.Spec) error { return nil },
	Open: func(_ context.Context, s host.Spec, _ bool) (*host.Backing, error) {
		key := s.Secrets["key"].Reveal()
		if slices.Contains(s.Options, "fail=on") {
			return nil, fmt.Errorf("vault: %s opens nothing, nor does %q", key, key)
		}
		m, err := memory.New(s.Size, memory.Options{})
		if err != nil {
			return nil, err
		}
		sum := sha256.Sum256([]byte(key))
		if _, err := m.WriteAt(sum[:], 0); err != nil {
			return nil, err
		}
		return &host.Backing{Backend: vault{m, key}, Close: m.Close,
			Warnings: []string{"vault: the key is " + key}}, nil
	},
}

// A vault is memory whose second half can be neither read nor written.
type vault struct {
	memory *memory.Memory
	key    string
}

func (v vault) Size() int64 { return v.memory.Size() }

func (v vault) ReadAt(p []byte, off int64) (int, error) {
	if off >= v.Size()/2 {
		return 0, fmt.Errorf("the key %s does not fit", v.key)
	}
	return v.memory.ReadAt(p, off)
}

func (v vault) WriteAt(p []byte, off int64) (int, error) {
	if off >= v.Size()/2 {
		return 0, fmt.Errorf("the key %q does not fit", v.key)
	}
	return v.memory.WriteAt(p, off)
}

// newSecret returns a secret that is nowhere yet, and a file that holds it.
func newSecret(t *testing.T) (text, path string) {
	t.Helper()
	// With a quote, as a key has that somebody chose.
	text = "geheim\"" + rand.Text()
	path = filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(path, []byte(text+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return text, path
}

// tellTale is the part of a secret that no form of it loses.
func tellTale(secret string) string { return strings.TrimPrefix(secret, "geheim\"") }

// piped has cmd find the content of the file at path at descriptor 3, through a pipe.
func piped(t *testing.T, cmd *exec.Cmd, path string) {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	if _, err := w.Write(content); err != nil {
		t.Fatal(err)
	}
	w.Close()
	cmd.ExtraFiles = append(cmd.ExtraFiles, r)
}

// readable returns what others may read: the arguments and the environment of every process, and
// the files below dir. Each of the strings in present must be somewhere in it, which shows that
// there was something to read.
func readable(t *testing.T, dir string, present ...string) map[string][]byte {
	t.Helper()
	var paths []string
	for _, pattern := range []string{"/proc/[0-9]*/cmdline", "/proc/[0-9]*/environ", "/proc/[0-9]*/comm"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		paths = append(paths, found...)
	}
	if dir != "" {
		paths = append(paths, files(t, dir)...)
	}
	texts := make(map[string][]byte)
	for _, path := range paths {
		if info, err := os.Stat(path); err != nil || !info.Mode().IsRegular() {
			continue // a process that has ended, or a socket
		}
		if b, err := os.ReadFile(path); err == nil {
			texts[path] = b
		}
	}
	for _, p := range present {
		found := false
		for _, b := range texts {
			found = found || bytes.Contains(b, []byte(p))
		}
		if !found {
			t.Errorf("nothing that can be read has %q: what was looked at?", p)
		}
	}
	return texts
}

// hides fails the test if a text has the secret.
func hides(t *testing.T, secret string, texts map[string][]byte) {
	t.Helper()
	for name, b := range texts {
		if bytes.Contains(b, []byte(tellTale(secret))) {
			t.Errorf("%s has the secret: %q", name, b)
		}
	}
}

// of are the texts that a command has printed.
func (r result) of(command string) map[string][]byte {
	return map[string][]byte{command + ", stdout": []byte(r.stdout), command + ", stderr": []byte(r.stderr)}
}

// TestKernelSecret gives a device's backend a secret in each way, and reads whatever others can
// read of it.
func TestKernelSecret(t *testing.T) {
	requireKernel(t, `I/O error|Other side returned error`)
	dir := os.Getenv("NBDCTL_STATE_DIR")
	for _, way := range []string{"file", "pipe"} {
		text, path := newSecret(t)
		reference := "fd:3"
		if way == "file" {
			reference = "file:" + path
		}
		cmd := nbdctlCommand(t, "connect", "vault", "--size", "1M", "-o", "key="+reference)
		if way == "pipe" {
			piped(t, cmd, path)
		}
		r := finish(t, cmd)
		if r.code != 0 || !strings.Contains(r.stderr, "vault: the key is ***") {
			t.Fatalf("%s: exit code %d, %s", way, r.code, r.stderr)
		}
		hides(t, text, r.of("connect"))
		dev := strings.TrimSpace(r.stdout)
		t.Cleanup(func() { nbdctl(t, "disconnect", "--force", dev) }) // where the test ended before
		sum := sha256.Sum256([]byte(text))
		if got := sh(t, "head -c 32 "+dev+" | od -An -v -tx1 | tr -d ' \\n'"); got != fmt.Sprintf("%x", sum) {
			t.Errorf("%s: the serving process has another secret", way)
		}
		for _, dd := range []string{"if=" + dev + " of=/dev/null skip=1536 iflag=direct",
			"if=/dev/zero of=" + dev + " seek=1536 oflag=direct"} {
			if r := finish(t, command(t, "sh", "-c", "dd bs=512 count=1 "+dd)); r.code == 0 {
				t.Error("the second half can be used")
			}
		}
		must(t, "reconfigure", dev, "--timeout", "40s") // writes the record
		status := nbdctl(t, "status", "--json", dev)
		if !strings.Contains(status.stdout, "does not fit") || !strings.Contains(status.stdout, `the key \"***\"`) {
			t.Errorf("status does not tell the error: %s", status.stdout)
		}
		hides(t, text, status.of("status"))
		for _, command := range []string{"list", "list --json", "stats --json " + dev} {
			hides(t, text, nbdctl(t, strings.Fields(command)...).of(command))
		}
		hides(t, text, readable(t, dir, "NBDCTL_STATE_DIR="+dir, host.Command, `"kind": "vault"`, "does not fit"))
		if got := sh(t, "stat -c %a "+dir+"/*/log"); got != "600" {
			t.Errorf("the log has mode %s", got)
		}
		end := nbdctl(t, "disconnect", dev)
		if !strings.Contains(end.stdout, "disconnected") {
			t.Errorf("disconnect: %s", end.stderr)
		}
		hides(t, text, end.of("disconnect"))
	}
}

// TestKernelSecretRefused opens a backend that fails and says the secret, in the background and in
// the foreground.
func TestKernelSecretRefused(t *testing.T) {
	requireKernel(t)
	text, path := newSecret(t)
	for _, flag := range []string{"--json", "--foreground"} {
		r := nbdctl(t, "connect", "vault", "--size", "1M", "-o", "fail=on", flag, "-o", "key=file:"+path)
		if r.code != int(exit.Failure) || !strings.Contains(r.stderr, `*** opens nothing, nor does "***"`) {
			t.Errorf("%s: exit code %d, %s", flag, r.code, r.stderr)
		}
		hides(t, text, r.of("connect"))
	}
}

// TestServeSecret gives a server's backend a secret, and reads whatever others can read of it.
func TestServeSecret(t *testing.T) {
	text, path := newSecret(t)
	for _, way := range []string{"key=file:" + path, "key=fd:3", "key=fd:0"} {
		cmd := nbdctlCommand(t, "serve", "vault", "--size", "1M", "--listen", "tcp:127.0.0.1:0", "-o", way)
		var stderr lockedBuffer
		cmd.Stderr = &stderr
		switch way {
		case "key=fd:3":
			piped(t, cmd, path)
		case "key=fd:0":
			in, err := os.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer in.Close()
			cmd.Stdin = in
		}
		c := dial(t, started(t, cmd))
		sum := sha256.Sum256([]byte(text))
		if p, errno, err := c.do(0, 0, 32, nil); !bytes.Equal(p, sum[:]) || errno != 0 || err != nil {
			t.Errorf("%s: the server has another secret: %d, %v", way, errno, err)
		}
		if _, errno, err := c.do(0, 1<<19, 512, nil); errno == 0 || err != nil {
			t.Errorf("%s: the second half can be read: %d, %v", way, errno, err)
		}
		stderr.await(t, "does not fit")
		hides(t, text, readable(t, "", "serve\x00vault"))
		ends(t, cmd, 15)
		hides(t, text, result{stderr: stderr.String()}.of("serve"))
		if !strings.Contains(stderr.String(), "the key is ***") {
			t.Errorf("%s: %s", way, stderr.String())
		}
	}
}

// TestSecretUsage holds what is refused, and that it is not repeated.
func TestSecretUsage(t *testing.T) {
	text, path := newSecret(t)
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		options []string
		code    exit.Code
		says    string
	}{
		{[]string{"key=" + text}, exit.Usage,
			"-o key: is secret, and the command line is not: everybody can read it; give file:PATH"},
		{[]string{"key=" + text, "key=file:" + path}, exit.Usage, "-o key: is secret"},
		{[]string{"key=env:" + text}, exit.Usage, "or fd:N"},
		{[]string{"kee=" + text}, exit.Usage, `-o kee=***: vault has no option "kee", only key, fail`},
		{[]string{"key=file:" + path, "fail=on"}, exit.Failure, "*** opens nothing"},
		{[]string{"key=file:" + empty}, exit.Failure, "-o key: file:" + empty + ": is empty"},
		{[]string{"key=file:/nowhere"}, exit.Failure, "/nowhere: no such file"},
		{[]string{"key=fd:777"}, exit.Failure, "without a descriptor 777"},
	} {
		args := []string{"serve", "vault", "--size", "1M", "--listen", "tcp:127.0.0.1:0"}
		for _, o := range tt.options {
			args = append(args, "-o", o)
		}
		var stderr bytes.Buffer
		code := run(t.Context(), args, io.Discard, &stderr)
		if code != tt.code || !strings.Contains(stderr.String(), tt.says) {
			t.Errorf("%q: exit code %d, %s; want %d, %s", tt.options, code, &stderr, tt.code, tt.says)
		}
		hides(t, text, result{stderr: stderr.String()}.of("serve"))
	}
}
