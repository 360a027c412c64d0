package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"os"
	"os/exec"
	"strings"
	"time"
)

// measureInside measures devices of all kinds; results go to a file as JSON.
func measureInside(ctx context.Context, o options, path string) error {
	var results []*result
	for _, s := range deviceSuites(o) {
		results = append(results, s.run(ctx, o)...)
	}
	out, err := json.Marshal(results)
	if err != nil {
		return err
	}
	return errors.Join(ctx.Err(), os.WriteFile(path, out, 0o644))
}

// run attaches the devices and gives the loads to them in turn.
func (s deviceSuite) run(ctx context.Context, o options) (results []*result) {
	b := &bench{suite: s.suite, timed: o.fio}
	b.attach(ctx, s.devices, &workspace{dir: o.out, shm: "/dev/shm"})
	b.each(func(d *attached) error { return verifyDevice(d.path) })
	for _, l := range b.loads {
		results = append(results, b.measure(ctx, l, o.rounds))
	}
	b.each(func(d *attached) error { return verifyDevice(d.path) })
	b.each(func(d *attached) error { return d.end(ctx) })
	failed := make([]error, len(b.devices))
	for i, d := range b.devices {
		failed[i] = d.failed
	}
	disqualify(results, failed)
	return results
}

// A bench is the devices under test.
type bench struct {
	suite
	devices []*attached
	timed   time.Duration
}

// An attached is a device that may have failed.
type attached struct {
	device
	path   string
	detach func() error
	failed error
}

// attach attaches the devices one after the other, and fails where it cannot.
func (b *bench) attach(ctx context.Context, devices []device, w *workspace) {
	for i, d := range devices {
		b.devices = append(b.devices, &attached{device: d, path: fmt.Sprintf("/dev/nbd%d", 8+i)})
	}
	b.each(func(d *attached) (err error) {
		if d.path, d.detach, err = d.device.attach(ctx, w, d.path); err != nil {
			return err
		}
		return awaitSize(ctx, d.path, false)
	})
}

func (d *attached) end(ctx context.Context) error {
	return errors.Join(d.detach(), awaitSize(context.WithoutCancel(ctx), d.path, true))
}

// each calls f for each device that has not failed. What has failed may stay attached: the machine
// is at its end then.
func (b *bench) each(f func(*attached) error) {
	for _, d := range b.devices {
		if d.failed != nil {
			continue
		}
		if err := f(d); err != nil {
			log.Printf("%s: %s fails: %v", b.name, d.name, err)
			d.failed = err
		}
	}
}

// measure gives a load to the devices in turn, each round beginning with another one.
func (b *bench) measure(ctx context.Context, l load, rounds int) *result {
	r := &result{Case: b.caseName(l)}
	for _, d := range b.devices {
		r.Servers = append(r.Servers, &serverResult{Name: d.name, Role: d.role})
	}
	for round := range rounds {
		for k := range b.devices {
			i := (round + k) % len(b.devices)
			d := b.devices[i]
			if d.failed != nil {
				continue
			}
			s, err := fio(ctx, d.path, l, b.timed)
			if err != nil {
				log.Printf("%s: %s fails: %v", b.name, d.name, err)
				d.failed = err
			}
			r.Servers[i].Samples = append(r.Servers[i].Samples, s)
		}
	}
	return r
}

// fio gives a load to a device.
func fio(ctx context.Context, path string, l load, timed time.Duration) (sample, error) {
	flags := append(fioFlags(l, deviceSize, timed), "--filename="+path, "--ioengine=libaio", "--direct=1")
	out, err := output(ctx, append([]string{"fio"}, flags...)...)
	if err != nil {
		return sample{}, err
	}
	return parseFio([]byte(out), l)
}

// output runs a command and returns what it prints.
func output(ctx context.Context, argv ...string) (string, error) {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	var said strings.Builder
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s: %w: %s%s", argv[0], err, said.String(), out)
	}
	return string(out), nil
}
