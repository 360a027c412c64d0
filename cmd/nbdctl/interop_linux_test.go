//go:build interop

// These tests need clients of a newer Debian suite, which make interop fetches.

package main

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// script has libnbd do everything on 4 TiB of zeroes, as the client of that form: with simple
// replies, structured ones, or extended headers.
const script = `
import os, nbd

TiB, GiB, form = 1 << 40, 1 << 30, os.environ["FORM"]
h.set_request_structured_replies(form != "simple")
h.set_request_extended_headers(form == "extended")
if form != "simple":
    h.add_meta_context("base:allocation")
h.connect_uri(os.environ["URI"])
assert h.get_size() == 4 * TiB
assert h.get_structured_replies_negotiated() == (form != "simple")
assert h.get_extended_headers_negotiated() == (form == "extended")
most = 4 * TiB if form == "extended" else 4 * GiB - 65536

def status(length, offset):
    got = []
    def take(context, at, extents, error):
        assert context == "base:allocation" and at == offset and error.value == 0
        got.extend(extents)
        return 0
    h.block_status_64(length, offset, take)
    return got

h.zero(most, 0)
h.zero(most, 0, nbd.CMD_FLAG_FAST_ZERO)
h.zero(65536, 0, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
h.trim(most, 0)
h.cache(most, 0)
data = os.urandom(300000)
h.pwrite(data, 2 * TiB - 1000, nbd.CMD_FLAG_FUA)
h.flush()
assert h.pread(300000, 2 * TiB - 1000) == data
assert h.pread(5, 3 * TiB) == bytes(5)
if form != "simple":
    assert status(GiB, TiB) == [(GiB, 3)]
    around = status(GiB, 2 * TiB - GiB // 2)
    assert [flags for _, flags in around] == [3, 0, 3] and sum(n for n, _ in around) == GiB
    chunks = []
    def take(part, offset, kind, error):
        chunks.append((offset, len(part), kind))
        return 0
    h.pread_structured(1 << 20, 3 * TiB, take)
    assert chunks == [(3 * TiB, 1 << 20, nbd.READ_HOLE)], chunks
    h.pread_structured(1 << 20, 3 * TiB, take, nbd.CMD_FLAG_DF)
    assert chunks[1:] == [(3 * TiB, 1 << 20, nbd.READ_DATA)], chunks
if form == "extended":
    assert sum(n for n, _ in status(4 * TiB, 0)) == 4 * TiB
    assert h.can_block_status_payload()
    chosen = []
    h.block_status_filter(GiB, TiB, ["base:allocation"], lambda c, o, extents, e: chosen.extend(extents) or 0)
    assert chosen == [(GiB, 3)], chosen

# 64 in flight.
buffers, cookies = [], []
for i in range(64):
    b = nbd.Buffer.from_bytearray(bytearray(os.urandom(65536)))
    buffers.append(b)
    cookies.append(h.aio_pwrite(b, TiB + i * 65536))
while h.aio_in_flight() > 0:
    h.poll(-1)
assert all(h.aio_command_completed(c) for c in cookies)
for i, b in enumerate(buffers):
    assert h.pread(65536, TiB + i * 65536) == b.to_bytearray()

# What is wrong is refused, and nothing behind it.
h.set_strict_mode(0)
for wrong in (lambda: h.pread(64 << 20, 0), lambda: h.pread(1, 4 * TiB), lambda: h.trim(1, 4 * TiB),
              lambda: h.zero(65536, 4 * TiB - 1), lambda: h.cache(2, 4 * TiB - 1),
              lambda: h.pread(1, 0, nbd.CMD_FLAG_REQ_ONE)):
    try:
        wrong()
    except nbd.Error as e:
        assert e.errno in ("EINVAL", "ENOSPC"), e
    else:
        assert False, "it was done"
assert h.pread(300000, 2 * TiB - 1000) == data
h.shutdown()
`

// TestInteropForms has libnbd speak to serve in all three forms.
func TestInteropForms(t *testing.T) {
	tools(t, "nbdsh")
	for _, form := range []string{"simple", "structured", "extended"} {
		t.Run(form, func(t *testing.T) {
			cmd := command(t, "nbdsh", "-c", script)
			cmd.Env = append(os.Environ(), "FORM="+form, "URI="+exported(t, "--size", "4T", "memory"))
			if r := finish(t, cmd); r.code != 0 {
				t.Errorf("nbdsh: %d, %s%s", r.code, r.stdout, r.stderr)
			}
		})
	}
}

// TestInteropNewer has newer clients than the machine's look at an image, copy it, and compare.
// They use extended headers unasked.
func TestInteropNewer(t *testing.T) {
	tools(t, "nbdinfo", "nbdcopy", "qemu-img", "qemu-io")
	const mib = 1 << 20
	dir := shortDir(t)
	image, to := filepath.Join(dir, "image"), filepath.Join(dir, "copy")
	data := make([]byte, 64*mib)
	rand.Read(data[5*mib : 9*mib])
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	sh(t, "truncate -s 64M "+image)
	uri := exported(t, "file", image)

	var info struct {
		Extended bool
		Exports  []struct {
			Cache    bool `json:"can_cache"`
			FastZero bool `json:"can_fast_zero"`
		}
	}
	if err := json.Unmarshal([]byte(sh(t, "nbdinfo --json '"+uri+"'")), &info); err != nil {
		t.Fatal(err)
	}
	if len(info.Exports) != 1 || !info.Extended || !info.Exports[0].Cache || !info.Exports[0].FastZero {
		t.Errorf("nbdinfo: %+v", info)
	}

	source := filepath.Join(dir, "source")
	if err := os.WriteFile(source, data, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, in := range []string{
		"nbdcopy --connections=4 " + source + " '" + uri + "'",
		"qemu-img convert -n -f raw -O raw " + source + " '" + uri + "'",
	} {
		sh(t, "nbdsh -u '"+uri+"' -c 'h.trim(h.get_size(), 0)'")
		sh(t, in)
		if got, err := os.ReadFile(image); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%s: %v, or other bytes", in, err)
		}
		for _, out := range []string{
			"nbdcopy --connections=4 '" + uri + "' " + to,
			"qemu-img convert -f raw -O raw '" + uri + "' " + to,
		} {
			sh(t, out)
			if got, err := os.ReadFile(to); err != nil || !bytes.Equal(got, data) {
				t.Errorf("%s: %v, or other bytes", out, err)
			}
			os.Remove(to)
		}
		sh(t, "qemu-img compare -f raw -F raw "+source+" '"+uri+"'")
	}

	var pieces []piece
	if err := json.Unmarshal([]byte(sh(t, "nbdinfo --map --json '"+uri+"'")), &pieces); err != nil {
		t.Fatal(err)
	}
	want := []piece{{Length: 5 * mib, Type: 3}, {Offset: 5 * mib, Length: 4 * mib},
		{Offset: 9 * mib, Length: 55 * mib, Type: 3}}
	if diff := cmp.Diff(want, pieces); diff != "" {
		t.Errorf("nbdinfo --map (-want +got):\n%s", diff)
	}
	sh(t, "qemu-io -f raw '"+uri+"' -c 'write -z -u 5M 1M' -c 'discard 6M 1M' -c 'read -P 0 5M 2M' | "+
		"tee /dev/stderr | (! grep -i fail)")
}
