package main

import (
	"bytes"
	"encoding/json"
	"runtime"
	"runtime/debug"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
)

// TestBuild holds what is said of each way to build the command.
func TestBuild(t *testing.T) {
	const commit = "951cde1ff08a5a2c1d9d9b1f6d5c4b3a29180706"
	main := func(version string) debug.Module {
		return debug.Module{Path: "github.com/nbdctl/nbdctl", Version: version}
	}
	checkout := func(modified string) []debug.BuildSetting {
		return []debug.BuildSetting{{Key: "-trimpath", Value: "true"}, {Key: "vcs", Value: "git"},
			{Key: "vcs.revision", Value: commit},
			{Key: "vcs.time", Value: "2026-11-28T21:04:05Z"}, {Key: "vcs.modified", Value: modified}}
	}
	for _, tt := range []struct {
		name       string
		info       *debug.BuildInfo
		text, json string
	}{
		{"go install of a tag",
			&debug.BuildInfo{GoVersion: "go1.26.8", Main: main("v0.3.1")},
			"nbdctl v0.3.1, go1.26.8",
			`{"version":"v0.3.1","commit":null,"date":null,"modified":null,"go":"go1.26.8"}`},
		{"go install of a release candidate",
			&debug.BuildInfo{GoVersion: "go1.26.8", Main: main("v0.3.1-rc.1")},
			"nbdctl v0.3.1-rc.1, go1.26.8",
			`{"version":"v0.3.1-rc.1","commit":null,"date":null,"modified":null,"go":"go1.26.8"}`},
		{"go install of a commit",
			&debug.BuildInfo{GoVersion: "go1.26.8", Main: main("v0.0.0-20261128210405-951cde1ff08a")},
			"nbdctl, commit 951cde1ff08a, 2026-11-28T21:04:05Z, go1.26.8",
			`{"version":"v0.0.0-20261128210405-951cde1ff08a","commit":"951cde1ff08a",` +
				`"date":"2026-11-28T21:04:05Z","modified":null,"go":"go1.26.8"}`},
		{"go install of a commit after a tag",
			&debug.BuildInfo{GoVersion: "go1.26.8", Main: main("v0.3.2-0.20261128210405-951cde1ff08a")},
			"nbdctl, commit 951cde1ff08a, 2026-11-28T21:04:05Z, go1.26.8",
			`{"version":"v0.3.2-0.20261128210405-951cde1ff08a","commit":"951cde1ff08a",` +
				`"date":"2026-11-28T21:04:05Z","modified":null,"go":"go1.26.8"}`},
		{"a checkout of a tag",
			&debug.BuildInfo{GoVersion: "go1.26.8", Main: main("v0.3.1"), Settings: checkout("false")},
			"nbdctl v0.3.1, commit 951cde1ff08a, 2026-11-28T21:04:05Z, go1.26.8",
			`{"version":"v0.3.1","commit":"` + commit + `",` +
				`"date":"2026-11-28T21:04:05Z","modified":false,"go":"go1.26.8"}`},
		{"a checkout of a commit",
			&debug.BuildInfo{GoVersion: "go1.26.8", Main: main("v0.0.0-20261128210405-951cde1ff08a"),
				Settings: checkout("false")},
			"nbdctl, commit 951cde1ff08a, 2026-11-28T21:04:05Z, go1.26.8",
			`{"version":"v0.0.0-20261128210405-951cde1ff08a","commit":"` + commit + `",` +
				`"date":"2026-11-28T21:04:05Z","modified":false,"go":"go1.26.8"}`},
		{"a modified checkout",
			&debug.BuildInfo{GoVersion: "go1.26.8", Main: main("v0.0.0-20261128210405-951cde1ff08a+dirty"),
				Settings: checkout("true")},
			"nbdctl, commit 951cde1ff08a, 2026-11-28T21:04:05Z, with changes, go1.26.8",
			`{"version":"v0.0.0-20261128210405-951cde1ff08a+dirty","commit":"` + commit + `",` +
				`"date":"2026-11-28T21:04:05Z","modified":true,"go":"go1.26.8"}`},
		{"a modified checkout of a tag",
			&debug.BuildInfo{GoVersion: "go1.26.8", Main: main("v0.3.1+dirty"), Settings: checkout("true")},
			"nbdctl v0.3.1, commit 951cde1ff08a, 2026-11-28T21:04:05Z, with changes, go1.26.8",
			`{"version":"v0.3.1+dirty","commit":"` + commit + `",` +
				`"date":"2026-11-28T21:04:05Z","modified":true,"go":"go1.26.8"}`},
		{"a checkout, by a Go that makes no version of it",
			&debug.BuildInfo{GoVersion: "go1.23.0", Main: main("(devel)"), Settings: checkout("false")},
			"nbdctl, commit 951cde1ff08a, 2026-11-28T21:04:05Z, go1.23.0",
			`{"version":null,"commit":"` + commit + `",` +
				`"date":"2026-11-28T21:04:05Z","modified":false,"go":"go1.23.0"}`},
		{"a directory without version control",
			&debug.BuildInfo{GoVersion: "go1.26.8", Main: main("(devel)")},
			"nbdctl, built from an unknown version, go1.26.8",
			`{"version":null,"commit":null,"date":null,"modified":null,"go":"go1.26.8"}`},
		{"no information at all", nil,
			"nbdctl, built from an unknown version",
			`{"version":null,"commit":null,"date":null,"modified":null,"go":null}`},
	} {
		b := buildOf(tt.info)
		if diff := cmp.Diff(tt.text, b.String()); diff != "" {
			t.Errorf("%s:\n%s", tt.name, diff)
		}
		object, err := json.Marshal(b)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(tt.json, string(object)); diff != "" {
			t.Errorf("%s, JSON:\n%s", tt.name, diff)
		}
	}
}

// TestVersion holds that the command and the flag say the same, whatever else is on the line.
func TestVersion(t *testing.T) {
	said := func(line string) string {
		t.Helper()
		var stdout, stderr bytes.Buffer
		if code := run(t.Context(), strings.Fields(line), &stdout, &stderr); code != exit.OK || stderr.Len() != 0 {
			t.Errorf("%s: exit code %d, %s", line, code, &stderr)
		}
		return stdout.String()
	}
	want := said("version")
	if !strings.HasPrefix(want, "nbdctl") || !strings.HasSuffix(want, ", "+runtime.Version()+"\n") {
		t.Errorf("version prints %q", want)
	}
	for _, line := range []string{"--version", "-v", "--version list", "-version=true"} {
		if got := said(line); got != want {
			t.Errorf("%s prints %q, want %q", line, got, want)
		}
	}
	var object map[string]any
	for _, line := range []string{"version --json", "--version --json"} {
		if err := json.Unmarshal([]byte(said(line)), &object); err != nil || object["go"] != runtime.Version() ||
			len(object) != 5 {
			t.Errorf("%s prints %v, %v", line, object, err)
		}
	}
	if got := said("--help --version"); !strings.Contains(got, "COMMANDS:") {
		t.Errorf("--help --version prints %q", got)
	}
	var stdout, stderr bytes.Buffer
	if code := run(t.Context(), []string{"version", "nbd0"}, &stdout, &stderr); code != exit.Usage ||
		stdout.Len() != 0 {
		t.Errorf("version nbd0: exit code %d, %s", code, &stdout)
	}
}
