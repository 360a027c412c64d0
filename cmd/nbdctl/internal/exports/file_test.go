package exports

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
)

// TestParse holds what a file says.
func TestParse(t *testing.T) {
	got, err := parse([]byte(`{
		"version": 1, "default": "disk", "hidden": true,
		"exports": [
			{"name": "disk", "kind": "file", "arg": "disk.img", "read_only": true, "description": "the first",
			 "block_size": 4096, "options": {"lock": "off", "direct": "on"}},
			{"name": "", "kind": "file", "arg": "/srv/new.img", "create": true, "size": "1G"},
			{"name": "scratch", "kind": "memory", "size": 1048576}
		],
		"folders": [{"path": "images", "prefix": "images/", "read_only": true, "description": "an image"}]
	}`), "/etc/nbd")
	if err != nil {
		t.Fatal(err)
	}
	want := Offer{
		Default: "disk", Hidden: true,
		Exports: []Definition{
			{Name: "disk", Description: "the first", Spec: host.Spec{Kind: "file", Arg: "/etc/nbd/disk.img",
				ReadOnly: true, BlockSize: 4096, Options: []string{"direct=on", "lock=off"}}},
			{Spec: host.Spec{Kind: "file", Arg: "/srv/new.img", Create: true, Size: 1 << 30}},
			{Name: "scratch", Spec: host.Spec{Kind: "memory", Size: 1 << 20}},
		},
		Folders: []Folder{{Path: "/etc/nbd/images", Prefix: "images/", Template: Definition{Name: "images/",
			Description: "an image", Spec: host.Spec{Kind: "file", ReadOnly: true}}}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// TestParseRefused holds what is no file of exports, and that the error leads to what is wrong.
func TestParseRefused(t *testing.T) {
	const memory = `{"name": "a", "kind": "memory", "size": "1M"}`
	for _, tt := range []struct{ text, says string }{
		{"", "line 1: EOF"},
		{"{\n\"version\": 1,\n}", "line 3: invalid character"},
		{"{\n\"version\": 1,\n\"export\": []}", `line 3: json: unknown field "export"`},
		{`{"version": 1} {}`, "something comes behind the end"},
		{"{}", `"version" is 0; this nbdctl knows 1`},
		{`{"version": 2}`, `"version" is 2`},
		{`{"version": "1"}`, "line 1: "},
		{`{"version": 1}`, `neither "exports" nor "folders" has anything`},
		{`{"version": 1, "exports": [` + memory + `, ` + memory + `]}`, `export "a" is there twice`},
		{`{"version": 1, "default": "b", "exports": [` + memory + `]}`,
			`"default" is "b", and there is no such export`},
		{`{"version": 1, "exports": [{"name": "a", "kind": "tape"}]}`, `export "a", number 1: unknown backend "tape"`},
		{`{"version": 1, "exports": [{"name": "a", "kind": "memory", "size": "1 parsec"}]}`, "a size is"},
		{`{"version": 1, "exports": [{"name": "a", "kind": "file"}]}`, "file needs a path"},
		{`{"version": 1, "exports": [{"name": "a", "kind": "memory", "size": 1, "options": {"x": "y"}}]}`,
			`no option "x"`},
		{`{"version": 1, "exports": [{"name": "a\u0000", "kind": "memory", "size": 1}]}`, "number 1: name: "},
		{`{"version": 1, "exports": [{"name": "` + strings.Repeat("a", 4097) + `", "kind": "memory", "size": 1}]}`,
			"4096"},
		{`{"version": 1, "exports": [{"name": "a", "kind": "memory", "size": 1024, "block_size": 3}]}`,
			"block_size 3: must"},
		{`{"version": 1, "exports": [{"name": "a", "kind": "memory", "size": 1000, "block_size": 512}]}`, "multiple"},
		{`{"version": 1, "folders": [{"path": "x", "block_size": 300}]}`, "block_size 300: must"},
		{`{"version": 1, "folders": [{}]}`, `folder "", number 1: "path" is missing`},
		{`{"version": 1, "folders": [{"path": "x", "options": {"x": "y"}}]}`, `no option "x"`},
	} {
		if _, err := parse([]byte(tt.text), "/"); err == nil || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%.80s: %v, want %q", tt.text, err, tt.says)
		}
	}
}

// TestFolderNames holds that a name leads to a file of the folder, and nowhere else.
func TestFolderNames(t *testing.T) {
	f := Folder{Path: "/srv", Prefix: "p/"}
	for name, path := range map[string]string{
		"p/disk.img": "/srv/disk.img", "p/ü": "/srv/ü", "p/a b": "/srv/a b",
		"disk.img": "", "p/": "", "p": "", "": "", "p/..": "", "p/.": "", "p/.hidden": "", "p/a/b": "", "p//a": "",
		"p/../x": "", "p/a\x00": "", "p/\xff": "",
	} {
		d, ok := f.find(name)
		if d.Spec.Arg != path || ok != (path != "") || ok && (d.Name != name || filepath.Dir(d.Spec.Arg) != f.Path) {
			t.Errorf("%q: %+v, %v", name, d, ok)
		}
	}
}
