//go:build interop

package main

import (
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/nbdctl/nbdctl/testdata/certs"
)

// TestInteropTester has the tests of nbd-server tried on serve, in all modes but one: those of
// requests beyond 32 MiB, which serve does not take.
func TestInteropTester(t *testing.T) {
	tools(t, "nbd-tester-client")
	tester, err := exec.LookPath("nbd-tester-client")
	if err != nil {
		t.Fatal(err)
	}
	log := filepath.Join(filepath.Dir(tester), "integrity-test.tr")
	dir, stranger := t.TempDir(), t.TempDir()
	certs.New(t).Write(t, dir)
	certs.New(t).Write(t, stranger)
	credentials := func(dir string) []string {
		return []string{"-C", dir + "/client-cert.pem", "-K", dir + "/client-key.pem", "-A", dir + "/ca-cert.pem"}
	}
	plain := []string{"--size", "50M", "memory"}
	secure := append([]string{"--tls-certificates", dir, "--tls-verify-peer"}, plain...)
	for _, tt := range []struct {
		name        string
		serve, test []string
	}{
		{"read", plain, nil},
		{"oversize", plain, []string{"-o"}},
		{"write", plain, []string{"-w"}},
		{"flush", plain, []string{"-w", "-f"}},
		{"read-only", append([]string{"--read-only"}, plain...), []string{"-w", "-F"}},
		{"handshake", plain, []string{"-h"}},
		{"integrity", plain, []string{"-i", "-t", log}},
		{"TLS", secure, append([]string{"-i", "-t", log}, credentials(dir)...)},
		{"TLS, a stranger", secure, append([]string{"-F"}, credentials(stranger)...)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, uri, _ := servedFor(t, append([]string{"--listen", "tcp:localhost:0", "--name", "x"}, tt.serve...)...)
			_, at, _ := strings.Cut(uri, "://127.0.0.1:")
			port, _, _ := strings.Cut(at, "/")
			r := finish(t, command(t, tester, append(tt.test, "-N", "x", "localhost", port)...))
			if r.code != 0 {
				t.Errorf("%d, %s", r.code, r.stderr)
			}
		})
	}
}

// TestInteropPlugin has nbdkit in front of serve, as its client over TLS.
func TestInteropPlugin(t *testing.T) {
	tools(t, "nbdkit", "nbdinfo", "nbdcopy")
	dir := t.TempDir()
	certs.New(t).Write(t, dir)
	_, uri, _ := servedFor(t, "--listen", "tcp:localhost:0", "--tls-certificates", dir, "--tls-verify-peer",
		"--size", "16M", "memory")
	uri = strings.Replace(uri, "127.0.0.1", "localhost", 1)
	source := filepath.Join(t.TempDir(), "source")
	sh(t, "head -c 16M /dev/urandom >"+source+"; nbdkit -U - --threads 16 nbd tls=require tls-certificates="+dir+
		" uri='"+uri+"' --run 'nbdinfo --can trim $uri && nbdcopy --flush "+source+" $uri && "+
		"nbdcopy $uri - | cmp - "+source+"'")
}

// TestInteropVerify has fio write at random over four connections, and read it back. Over TLS it
// can't: it does not let libnbd read certificates.
func TestInteropVerify(t *testing.T) {
	tools(t, "fio")
	_, uri, _ := servedFor(t, "--listen", "tcp:localhost:0", "--size", "64M", "memory")
	sh(t, "cd "+t.TempDir()+"; fio --name=x --ioengine=nbd --uri='"+uri+"' --rw=randwrite --bsrange=512-256k "+
		"--iodepth=32 --numjobs=4 --offset_increment=16M --size=16M --io_size=32M --verify=crc32c --verify_fatal=1")
}

// TestInteropBoot boots a machine that has a disk from serve, which reads it whole and writes to
// it.
func TestInteropBoot(t *testing.T) {
	image := filepath.Join(t.TempDir(), "image")
	sh(t, "head -c 8M /dev/urandom >"+image)
	sum := sh(t, "sha256sum <"+image)
	server, uri, _ := servedFor(t, "--listen", "unix:"+filepath.Join(shortDir(t), "s"), "file", image)
	const inside = "disk=$(ls /dev/vd? | tail -n 1); sha256sum <$disk; " +
		"echo written | dd of=$disk bs=4k seek=1 conv=notrunc,fsync status=none"
	if got := sh(t, "../../testdata/lab/qemu --no-nbd --drive '"+uri+"' -- sh -c '"+inside+"'"); got != sum {
		t.Errorf("the machine reads %q, want %q", got, sum)
	}
	ends(t, server, syscall.SIGTERM)
	if got := sh(t, "dd if="+image+" bs=4k skip=1 count=1 status=none | head -n 1"); got != "written" {
		t.Errorf("the image has %q where the machine has written", got)
	}
}
