// Package cputime reads CPU times of processes and processors.
package cputime

import (
	"bufio"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Own returns what this process has used.
func Own() (time.Duration, error) { return read(unix.CLOCK_PROCESS_CPUTIME_ID) }

// Of returns what a process has used, without its children.
func Of(pid int) (time.Duration, error) {
	const schedulerClock = 2 // CPUCLOCK_SCHED of linux/posix-timers.h
	return read(int32(^pid<<3 | schedulerClock))
}

func read(clock int32) (time.Duration, error) {
	var t unix.Timespec
	if err := unix.ClockGettime(clock, &t); err != nil {
		return 0, fmt.Errorf("clock of CPU time: %w", err)
	}
	return time.Duration(t.Nano()), nil
}

// Processor returns what all processes have used of a processor, or of all if it is negative. The
// resolution is 10 ms for each.
func Processor(cpu int) (time.Duration, error) {
	const tick = 10 * time.Millisecond
	name := "cpu"
	if cpu >= 0 {
		name = fmt.Sprintf("cpu%d", cpu)
	}
	f, err := os.Open("/proc/stat")
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		rest, found := strings.CutPrefix(lines.Text(), name+" ")
		if !found {
			continue
		}
		var user, nice, system, idle, wait, irq, softirq time.Duration
		if _, err := fmt.Sscan(rest, &user, &nice, &system, &idle, &wait, &irq, &softirq); err != nil {
			return 0, fmt.Errorf("/proc/stat: %w", err)
		}
		return (user + nice + system + irq + softirq) * tick, nil
	}
	return 0, fmt.Errorf("/proc/stat has no %s", name)
}
