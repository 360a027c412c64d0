package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/machine"
)

// loadDriver sees to it that the kernel's nbd driver is there, loading its
// module if need be.
func loadDriver(ctx context.Context) error {
	err := probeDriver(ctx)
	if !errors.Is(err, nbdnl.ErrNoDriver) {
		return err
	}
	// modprobe also waits for one that is loading the module just now. It is
	// not in every root's PATH.
	modprobe := exec.CommandContext(ctx, "modprobe", "nbd")
	if modprobe.Err != nil {
		modprobe = exec.CommandContext(ctx, "/sbin/modprobe", "nbd")
	}
	var said bytes.Buffer
	modprobe.Stderr = &said
	failure := modprobe.Run()
	if err := probeDriver(ctx); !errors.Is(err, nbdnl.ErrNoDriver) {
		return err
	}
	if ctx.Err() != nil {
		return fmt.Errorf("loading the nbd module: %w", context.Cause(ctx))
	}
	if _, err := os.Stat("/sys/module/nbd"); err == nil {
		return exit.With(exit.Unsupported,
			"the nbd module is loaded, without devices, and the netlink family that could make some "+
				"does not show in this network namespace (kernels up to 6.1 have it in the first one only); "+
				"run nbdctl there: nsenter --net=/proc/1/ns/net nbdctl …")
	}
	reason := strings.TrimSpace(said.String())
	if reason == "" {
		reason = fmt.Sprint(failure)
	}
	return exit.With(exit.Unsupported, "this kernel (%s) has no nbd driver: modprobe nbd: %s; "+
		"install the kernel's full set of modules (Debian: linux-image-amd64 in place of the -cloud- flavour; "+
		"Ubuntu: linux-modules-extra-$(uname -r); Fedora: kernel-modules-core)", kernelRelease(), reason)
}

// probeDriver tells whether devices can be controlled here.
func probeDriver(ctx context.Context) error {
	c, err := nbdnl.New()
	if err != nil {
		return err
	}
	return errors.Join(c.Probe(ctx), c.Close())
}

func kernelRelease() string {
	return cmp.Or(machine.Root("").Release().Name, "unknown")
}

// capSysAdmin is the capability that the kernel asks for (nbd.c,
// nbd_genl_connect); linux/capability.h.
const capSysAdmin = 21

// privileged refuses to begin what the kernel would refuse at the end, when
// an image may have been created already.
func privileged(command string) error {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	for line := range strings.Lines(string(status)) {
		if set, ok := strings.CutPrefix(line, "CapEff:"); ok {
			caps, err := strconv.ParseUint(strings.TrimSpace(set), 16, 64)
			if err != nil {
				return fmt.Errorf("%s: /proc/self/status: %w", command, err)
			}
			if caps&(1<<capSysAdmin) != 0 {
				return nil
			}
		}
	}
	return exit.With(exit.Permission, "%s needs the capability CAP_SYS_ADMIN; run it as root (sudo nbdctl %[1]s …)",
		command)
}
