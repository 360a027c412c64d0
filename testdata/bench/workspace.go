package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// exportSize, in bytes, is the size of every export; a run uses less of it.
const exportSize = 1 << 30

// A workspace is the directory of a run: programs, images, sockets.
type workspace struct {
	tree string // the repository
	base string // an earlier commit of it to measure beside, or ""
	dir  string // on a disk
	shm  string // in memory
	// goNBD tells why there is no such peer; nil: there is.
	goNBD error
	// baseClient tells why base has no goclient; nil: it has one.
	baseClient error
}

// newWorkspace builds what the run needs. Paths of sockets have to stay below 108 bytes, so they
// are in shm.
func newWorkspace(ctx context.Context, tree, base, dir string) (*workspace, error) {
	shm, err := os.MkdirTemp("/dev/shm", "nbdctl-bench.")
	if err != nil {
		return nil, err
	}
	w := &workspace{tree: tree, base: base, dir: dir, shm: shm}
	if err := os.MkdirAll(w.path("images"), 0o755); err != nil {
		return w, err
	}
	return w, errors.Join(w.build(ctx), makeCertificates(w.path("certificates")))
}

func (w *workspace) build(ctx context.Context) error {
	bench := filepath.Join(w.tree, "testdata/bench")
	load := filepath.Join(bench, "load")
	cc := []string{"gcc", "-std=gnu17", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", "-o"}
	steps := [][]string{
		append(cc, w.path("floor"), "floor.c"),
		append(cc, w.path("loadgen"), "loadgen.c", "loop.c", "client.c", "cpu.c", "verify.c", "-lssl", "-lcrypto"),
		append(cc, w.path("libnbd"), "libnbd.c", "client.c", "cpu.c", "-lnbd", "-lssl", "-lcrypto"),
		{"go", "-C", w.tree, "build", "-trimpath", "-o", w.path("nbdctl"), "./cmd/nbdctl"},
		{"go", "-C", bench, "build", "-o", w.path("goserver"), "./goserver"},
		{"go", "-C", bench, "build", "-o", w.path("goclient"), "./goclient"},
	}
	if w.base != "" {
		nbdctl, goserver := w.path("base-nbdctl"), w.path("base-goserver")
		baseBench := filepath.Join(w.base, "testdata/bench")
		steps = append(steps,
			[]string{"go", "-C", w.base, "build", "-trimpath", "-buildvcs=false", "-o", nbdctl, "./cmd/nbdctl"},
			[]string{"go", "-C", baseBench, "build", "-o", goserver, "./goserver"},
		)
	}
	for _, argv := range steps {
		if err := run(ctx, load, argv...); err != nil {
			return err
		}
	}
	if w.base != "" {
		goclient := w.path("base-goclient")
		w.baseClient = run(ctx, w.base, "go", "-C", "testdata/bench", "build", "-o", goclient, "./goclient")
	}
	// The peer comes from elsewhere. Without it the others are still worth a run.
	w.goNBD = run(ctx, load, "go", "-C", bench, "build", "-o", w.path("gonbd"), "./gonbd")
	return nil
}

// path is where something of the run is.
func (w *workspace) path(name string) string { return filepath.Join(w.dir, name) }

// room makes a directory, in memory, for the servers of a suite: those that are killed leave their
// sockets behind. What it returns removes it.
func (w *workspace) room() (dir string, remove func() error, err error) {
	dir, err = os.MkdirTemp(w.shm, "")
	return dir, func() error { return os.RemoveAll(dir) }, err
}

// image makes an image of exportSize. What is going to be used of it, in bytes, is written here,
// and not first by the server: the sizes of the writes decide on the sizes of the page cache's
// folios, and these on what small writes cost later.
func image(path string, used int64) (_ string, err error) {
	path += ".img"
	f, err := os.Create(path)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	piece := make([]byte, 1<<20)
	for off := int64(0); off < used; off += int64(len(piece)) {
		if _, err := f.WriteAt(piece, off); err != nil {
			return "", err
		}
	}
	return path, f.Truncate(exportSize)
}

// remove leaves the programs, which the next run builds faster.
func (w *workspace) remove() error {
	if err := os.RemoveAll(w.path("images")); err != nil {
		return err
	}
	return os.RemoveAll(w.shm)
}

// run runs a command in dir; its error has what the command said.
func run(ctx context.Context, dir string, argv ...string) error {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", argv[0], err, out)
	}
	return nil
}
