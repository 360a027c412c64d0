package main

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/nbdctl/nbdctl/testdata/certs"
)

// TestServeTLS has the field's own clients talk over TLS, with and without certificates of theirs.
func TestServeTLS(t *testing.T) {
	tools(t, "nbdinfo", "nbdcopy", "qemu-img")
	dir, image := t.TempDir(), filepath.Join(t.TempDir(), "image")
	a := certs.New(t)
	a.Write(t, dir)
	data := make([]byte, 8<<20)
	rand.Read(data[:5<<20])
	if err := os.WriteFile(image, data, 0o600); err != nil {
		t.Fatal(err)
	}
	_, uri, stderr := servedFor(t, "file", image, "--listen", "tcp:localhost:0", "--name", "x",
		"--tls-certificates", dir, "--tls-verify-peer")
	rest, ok := strings.CutPrefix(uri, "nbds://127.0.0.1:")
	port, _, named := strings.Cut(rest, "/x")
	if !ok || !named {
		t.Fatalf("the URI is %s", uri)
	}
	uri = "nbds://localhost:" + port + "/x?tls-certificates=" + dir

	var info struct {
		TLS     bool
		Exports []struct {
			Size int64 `json:"export-size"`
		}
	}
	if err := json.Unmarshal([]byte(sh(t, "nbdinfo --json '"+uri+"'")), &info); err != nil {
		t.Fatal(err)
	}
	if !info.TLS || len(info.Exports) != 1 || info.Exports[0].Size != int64(len(data)) {
		t.Errorf("nbdinfo: %+v", info)
	}
	copied := filepath.Join(t.TempDir(), "copy")
	secured := " --object tls-creds-x509,id=t,endpoint=client,dir=" + dir
	options := "driver=nbd,host=localhost,port=" + port + ",export=x,tls-creds=t"
	for _, out := range []string{
		"nbdcopy --connections=4 '" + uri + "' " + copied,
		"qemu-img convert" + secured + " --image-opts " + options + " -O raw " + copied,
	} {
		sh(t, out)
		if got, err := os.ReadFile(copied); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%s: %v, or other bytes", out, err)
		}
		os.Remove(copied)
	}
	rand.Read(data[1<<20 : 7<<20])
	if err := os.WriteFile(copied, data, 0o600); err != nil {
		t.Fatal(err)
	}
	sh(t, "nbdcopy --connections=4 --flush "+copied+" '"+uri+"'")
	if got, err := os.ReadFile(image); err != nil || !bytes.Equal(got, data) {
		t.Errorf("nbdcopy: %v, or other bytes", err)
	}
	stderr.await(t, `tls="TLS 1.3" identity="CN=nbdctl test client" export=x`)

	// Who has no certificate, or a stranger's, or speaks plain text, learns nothing.
	stranger := t.TempDir()
	certs.New(t).Write(t, stranger)
	sh(t, "cp "+dir+"/ca-cert.pem "+stranger)
	for _, wrong := range []string{
		"nbdinfo --size 'nbd://localhost:" + port + "/x'",
		"nbdinfo --list 'nbd://localhost:" + port + "'",
		"nbdinfo --size 'nbds://localhost:" + port + "/x?tls-certificates=" + stranger + "'",
		"cd " + stranger + "; rm client-*.pem; nbdinfo --size 'nbds://localhost:" + port + "/x?tls-certificates=.'",
	} {
		if r := finish(t, command(t, "sh", "-c", wrong)); r.code == 0 || strings.Contains(r.stdout, "8388608") {
			t.Errorf("%s: %d, %s", wrong, r.code, r.stdout)
		}
	}
}

// TestServeTLSReload holds that SIGHUP has clients meet new certificates, while those that are
// there stay, and that what cannot be read changes nothing.
func TestServeTLSReload(t *testing.T) {
	tools(t, "nbdinfo", "qemu-io")
	dir := t.TempDir()
	first, second := certs.New(t), certs.New(t)
	first.Write(t, dir)
	server, uri, stderr := servedFor(t, "memory", "--size", "1M", "--listen", "unix:"+filepath.Join(shortDir(t), "s"),
		"--tls-certificates", dir, "--tls", "allow")
	if !strings.HasPrefix(uri, "nbd+unix:") {
		t.Errorf("where plain text is allowed the URI is %s", uri)
	}
	trusting := func(a *certs.Authority) bool {
		of := t.TempDir()
		a.Write(t, of)
		_, socket, _ := strings.Cut(uri, "socket=")
		return finish(t, command(t, "qemu-img", "info", "--object",
			"tls-creds-x509,id=t,endpoint=client,dir="+of, "--image-opts",
			"driver=nbd,path="+socket+",tls-creds=t,tls-hostname=localhost")).code == 0
	}
	if sh(t, "nbdinfo --size '"+uri+"'") != "1048576" || !trusting(first) || trusting(second) {
		t.Errorf("plain text, or who trusts the first authority, or does not")
	}
	second.Write(t, dir)
	hangup := func(awaited string) {
		t.Helper()
		if err := server.Process.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		stderr.await(t, awaited)
	}
	hangup("read again")
	if trusting(first) || !trusting(second) {
		t.Error("after SIGHUP the certificates are those of before")
	}
	if err := os.Chmod(filepath.Join(dir, "server-key.pem"), 0o644); err != nil {
		t.Fatal(err)
	}
	hangup("not read again; certificates stay as they are")
	if !trusting(second) {
		t.Error("after a SIGHUP that failed the certificates are others")
	}
	ends(t, server, syscall.SIGTERM)
	if r := nbdctl(t, "serve", "memory", "--size", "1M", "--listen", "tcp:127.0.0.1:0",
		"--tls-certificates", dir); r.code != 1 || !strings.Contains(r.stderr, "chmod o= ") {
		t.Errorf("a key for all: %d, %s", r.code, r.stderr)
	}
}
