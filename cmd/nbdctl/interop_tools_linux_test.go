//go:build interop

package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// negotiation has libnbd negotiate step by step with a server that has two exports, in another
// order than it would by itself, and repeat itself.
const negotiation = `
import os, nbd

h.set_opt_mode(True)
h.set_request_structured_replies(False)
h.set_request_extended_headers(False)
h.connect_uri(os.environ["URI"])
names = []
h.opt_list(lambda name, description: names.append((name, description)) or 0)
assert names == [("a", "the first"), ("b", "")], names
for name, size in ("a", 1 << 20), ("b", 2 << 20), ("a", 1 << 20):
    h.set_export_name(name)
    h.opt_info()
    assert h.get_size() == size and h.is_read_only() == (name == "b")
h.set_export_name("no")
try:
    h.opt_info()
except nbd.Error:
    pass
else:
    assert False, "there is no such export"
try:
    h.opt_go()
except nbd.Error:
    pass
else:
    assert False, "there is no such export"
h.set_export_name("b")
assert h.opt_structured_reply() and h.opt_structured_reply()
contexts = []
h.opt_list_meta_context(lambda name: contexts.append(name) or 0)
h.opt_list_meta_context_queries(["base:"], lambda name: contexts.append(name) or 0)
assert contexts == ["base:allocation"] * 2, contexts
chosen = []
h.opt_set_meta_context_queries(["x:y", "base:allocation"], lambda name: chosen.append(name) or 0)
assert chosen == ["base:allocation"], chosen
h.set_request_meta_context(False) # It would choose once more, and none.
h.opt_go()
assert h.get_size() == 2 << 20 and h.can_meta_context("base:allocation") and h.can_df()
assert h.pread(512, 1 << 20) == bytes(512)
h.shutdown()

h = nbd.NBD()
h.set_opt_mode(True)
h.connect_uri(os.environ["URI"])
h.opt_abort()
assert h.aio_is_closed()
`

// TestInteropTools has the field's tools list exports, ask what each can do, negotiate step by step
// and make a load.
func TestInteropTools(t *testing.T) {
	tools(t, "nbdinfo", "nbdsh", "qemu-img", "nbd-client")
	file := filepath.Join(t.TempDir(), "exports.json")
	definitions := `{"version": 1, "exports": [
		{"name": "a", "kind": "memory", "size": "1M", "description": "the first"},
		{"name": "b", "kind": "memory", "size": "2M", "read_only": true}]}`
	if err := os.WriteFile(file, []byte(definitions), 0o600); err != nil {
		t.Fatal(err)
	}
	_, uri, _ := servedFor(t, "--exports", file, "--listen", "tcp:127.0.0.1:0")
	server, _, _ := strings.Cut(uri, "/a")
	cmd := command(t, "nbdsh", "-c", negotiation)
	cmd.Env = append(os.Environ(), "URI="+server)
	if r := finish(t, cmd); r.code != 0 {
		t.Errorf("nbdsh: %d, %s%s", r.code, r.stdout, r.stderr)
	}

	var list struct {
		Exports []struct {
			Name string `json:"export-name"`
			Size int64  `json:"export-size"`
		}
	}
	if err := json.Unmarshal([]byte(sh(t, "nbdinfo --list --json '"+server+"'")), &list); err != nil {
		t.Fatal(err)
	}
	if e := list.Exports; len(e) != 2 || e[0].Name != "a" || e[0].Size != 1<<20 || e[1].Name != "b" ||
		e[1].Size != 2<<20 {
		t.Errorf("nbdinfo --list: %+v", list)
	}
	for _, what := range []string{"write", "flush", "fua", "trim", "zero", "fast-zero", "df", "multi-conn", "cache"} {
		reads := what == "df" || what == "multi-conn" || what == "cache"
		for export, can := range map[string]bool{"a": true, "b": reads} {
			r := finish(t, command(t, "nbdinfo", "--can", what, server+"/"+export))
			if r.code != 0 && can || r.code != 2 && !can {
				t.Errorf("nbdinfo --can %s %s: %d, want %v", what, export, r.code, can)
			}
		}
	}
	if r := finish(t, command(t, "nbdinfo", "--is", "readonly", server+"/b")); r.code != 0 {
		t.Errorf("nbdinfo --is readonly: %d, %s", r.code, r.stderr)
	}

	_, at, _ := strings.Cut(server, "://")
	host, port, _ := strings.Cut(at, ":")
	if got := sh(t, "nbd-client -l "+host+" -p "+port); !strings.Contains(got, "\na") || !strings.Contains(got, "\nb") {
		t.Errorf("nbd-client -l: %s", got)
	}
	sh(t, "qemu-img bench -f raw -c 2000 -d 32 '"+server+"/b'")
	sh(t, "qemu-img bench -f raw -w -c 2000 -d 32 --flush-interval 100 '"+server+"/a'")
}
