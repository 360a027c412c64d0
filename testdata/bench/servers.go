package main

import (
	"fmt"
	"net"
	"os"
	"strconv"
)

var theFloor = server{name: "floor", role: floor, command: func(w *workspace, at place) ([]string, error) {
	return []string{w.path("floor"), at.address, strconv.Itoa(exportSize)}, nil
}}

// theFileFloor is what a server of files can't do without.
var theFileFloor = server{name: "floor", role: floor, command: func(w *workspace, at place) ([]string, error) {
	path, err := image(at.image, at.used)
	return []string{w.path("floor"), at.address, strconv.Itoa(exportSize), path}, err
}}

func nbdctlMemory(name string, r role, env ...string) server {
	return nbdctlBuilt("nbdctl", name, r, env...)
}

// nbdctlBuilt is nbdctl over memory, by the program of that name in the workspace.
func nbdctlBuilt(program, name string, r role, env ...string) server {
	return nbdctlSized(program, name, exportSize, r, env...)
}

// nbdctlSized is the same with an export of so many bytes.
func nbdctlSized(program, name string, size int64, r role, env ...string) server {
	return server{name: name, role: r, env: env, command: func(w *workspace, at place) ([]string, error) {
		return []string{
			w.path(program), "serve", "--listen", at.url(), "--size", strconv.FormatInt(size, 10), "memory",
		}, nil
	}}
}

func nbdctlFile(program, name string, r role) server {
	return server{name: name, role: r, command: func(w *workspace, at place) ([]string, error) {
		path, err := image(at.image, at.used)
		return []string{w.path(program), "serve", "--listen", at.url(), "file", path}, err
	}}
}

// goServer is a goserver over a backend of that kind.
func goServer(name string, r role, flags []string, kind string) server {
	return goServerBuilt("goserver", name, r, flags, kind)
}

func goServerBuilt(program, name string, r role, flags []string, kind string) server {
	return server{name: name, role: r, command: func(w *workspace, at place) ([]string, error) {
		argv := append([]string{w.path(program)}, flags...)
		return append(argv, at.url(), kind, strconv.Itoa(exportSize)), nil
	}}
}

// nbdkit serves memory or a file, with its own number of threads or with as many as told: with one
// there is no hand-over between threads, which is faster except for many small requests.
func nbdkit(name, plugin string, threads ...string) server {
	return server{name: name, role: peer, command: func(w *workspace, at place) ([]string, error) {
		argv := []string{"nbdkit", "-f"}
		if len(threads) > 0 {
			argv = append(argv, "-t", threads[0])
		}
		if at.network == "unix" {
			argv = append(argv, "-U", at.address)
		} else {
			host, port, err := net.SplitHostPort(at.address)
			if err != nil {
				return nil, err
			}
			argv = append(argv, "-i", host, "-p", port)
		}
		if plugin == "memory" {
			return append(argv, "memory", strconv.Itoa(exportSize)), nil
		}
		path, err := image(at.image, at.used)
		return append(argv, "file", path), err
	}}
}

// qemuNBD has no store in memory but null-co, which moves no data; so its image lies there.
func qemuNBD() server {
	return server{name: "qemu-nbd", role: peer, command: func(w *workspace, at place) ([]string, error) {
		path, err := image(at.image, at.used)
		return []string{"qemu-nbd", "-t", "-e", "1024", "-k", at.address, "-f", "raw", path}, err
	}}
}

// nbdServer has no store in memory either. Told to stay in the foreground it would serve a single
// client.
func nbdServer() server {
	command := func(w *workspace, at place) ([]string, error) {
		path, err := image(at.image, at.used)
		if err != nil {
			return nil, err
		}
		config := at.image + ".conf"
		text := fmt.Sprintf("[generic]\nunixsock = %s\n[bench]\nexportname = %s\n", at.address, path)
		return []string{"nbd-server", "-C", config, "-p", at.pidFile}, os.WriteFile(config, []byte(text), 0o644)
	}
	return server{name: "nbd-server", role: peer, export: "bench", daemon: true, command: command}
}

func goNBD(kind string) server {
	return server{name: "go-nbd", role: peer, command: func(w *workspace, at place) ([]string, error) {
		if w.goNBD != nil {
			return nil, w.goNBD
		}
		if kind == "memory" {
			return []string{w.path("gonbd"), at.url(), "memory", strconv.Itoa(exportSize)}, nil
		}
		path, err := image(at.image, at.used)
		return []string{w.path("gonbd"), at.url(), "file", path}, err
	}}
}
