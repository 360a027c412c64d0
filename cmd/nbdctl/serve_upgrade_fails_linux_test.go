package main

import (
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/nbdctl/nbdctl/backends/nbd"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/parcel"
)

// TestServeUpgradeFails upgrades a server whose clients write and read, while something is wrong
// with the process that is to take over: the server goes on, its clients keep their connections,
// and the next upgrade succeeds.
func TestServeUpgradeFails(t *testing.T) {
	dir := shortDir(t)
	sh(t, "truncate -s 16M "+dir+"/disk.img")
	file, control, fate := filepath.Join(dir, "exports.json"), filepath.Join(dir, "ctl"), filepath.Join(dir, "fate")
	definitions := `{"version": 1, "default": "disk", "exports": [
		{"name": "disk", "kind": "file", "arg": "disk.img"}, {"name": "fragile", "kind": "fragile", "size": "16M"}]}`
	if err := os.WriteFile(file, []byte(definitions), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv(inheriting, fate)
	first, uri, stderr := servedFor(t, "--exports", file, "--listen", "tcp:127.0.0.1:0", "--control", control)
	endAll(t, file)
	at := strings.TrimSuffix(uri, "disk")
	var loads []*clientLoad
	for i, name := range []string{"disk", "disk", "fragile"} {
		loads = append(loads, loadClient(t, at+name, nbd.Options{}, int64(i)<<20))
	}
	pid := first.Process.Pid
	goOn := func(what string) {
		t.Helper()
		for _, l := range loads {
			l.goesOn(t)
		}
		if all := processes(t, file); len(all) != 1 || all[0] != pid {
			t.Errorf("%s: the processes are %v", what, all)
		}
	}
	for _, tt := range []struct{ what, says string }{
		{"fails", "it has gone to pieces"},
		{"panics", "the other process has hung up"},
		{"exits", "the other process has hung up"},
		{"is killed", "the other process has hung up"},
		{"is shorter", "its size is 16773120 bytes, and 16777216 were agreed"},
	} {
		if err := os.WriteFile(fate, []byte(tt.what), 0o600); err != nil {
			t.Fatal(err)
		}
		if r := nbdctl(t, "upgrade", "--server", control); !r.ended(exit.Failure, "was not upgraded", tt.says) {
			t.Errorf("%s: exit code %d, %s", tt.what, r.code, r.stderr)
		}
		goOn(tt.what)
	}
	for script, says := range map[string]string{
		"#!/bin/false\n":          "the other process has hung up",
		"no program":              "exec format error",
		"#!/bin/sh\necho hello\n": "the other process has hung up",
	} {
		path := filepath.Join(dir, "program")
		if err := os.WriteFile(path, []byte(script), 0o700); err != nil {
			t.Fatal(err)
		}
		if said := askHandOver(t, control, path); !strings.Contains(said, says) {
			t.Errorf("%q: %s", script, said)
		}
		goOn(script)
	}
	if said := askHandOver(t, control, ""); !strings.Contains(said, "a handover without a program") {
		t.Errorf("without a program: %s", said)
	}
	if err := os.Remove(fate); err != nil {
		t.Fatal(err)
	}
	must(t, "upgrade", "--server", control)
	for _, l := range loads {
		l.goesOn(t)
		l.stop(t)
	}
	log := stderr.String()
	if strings.Count(log, "goes on serving") != 7 || strings.Count(log, `msg="taken over"`) != 1 {
		t.Errorf("the log is:\n%s", log)
	}
	if err := first.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if err := first.Wait(); err != nil {
		t.Error(err)
	}
}

// askHandOver asks a server to be replaced by a program, and returns the answer.
func askHandOver(t *testing.T, control, program string) string {
	t.Helper()
	c, err := net.Dial("unix", control)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	request := []byte(`{"version": 1, "op": "handover"}` + "\n")
	if program == "" {
		_, err = c.Write(request)
	} else {
		f, openErr := os.Open(program)
		if openErr != nil {
			t.Fatal(openErr)
		}
		defer f.Close()
		err = parcel.SendFile(c, request, f)
	}
	if err != nil {
		t.Fatal(err)
	}
	var answer json.RawMessage
	if err := json.NewDecoder(c).Decode(&answer); err != nil {
		t.Fatal(err)
	}
	return string(answer)
}

// TestServeUpgradeRefused asks for upgrades that there can't be.
func TestServeUpgradeRefused(t *testing.T) {
	control := filepath.Join(shortDir(t), "ctl")
	for _, tt := range []struct {
		args []string
		code exit.Code
		says string
	}{
		{[]string{"--server", control}, exit.NotFound, "no server answers"},
		{[]string{"--server", control, "nbd3"}, exit.Usage, "takes no devices"},
		{[]string{"--server", control, "--all"}, exit.Usage, "takes no devices"},
	} {
		if r := nbdctl(t, append([]string{"upgrade"}, tt.args...)...); !r.ended(tt.code, tt.says) {
			t.Errorf("upgrade %v: exit code %d, %s", tt.args, r.code, r.stderr)
		}
	}
}
