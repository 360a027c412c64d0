package doctor

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/nbdnl"
)

// controlPatience bounds the wait for the kernel's answer, which takes less
// than a millisecond unless another program's command is stuck in it.
const controlPatience = 2 * time.Second

// control tells whether the kernel takes commands for devices from here.
func (m *Machine) control(ctx context.Context) []Finding {
	if !m.loaded() {
		// From Linux 6.12 on the question itself would load the module.
		m.silent = errors.New("the nbd module")
		return []Finding{unknown(m.silent.Error())}
	}
	m.silent, m.byIoctl = nil, false
	err := m.ask(ctx, nbdnl.ModeNetlink)
	if errors.Is(err, nbdnl.ErrNoDriver) {
		if err = m.ask(ctx, nbdnl.ModeIoctl); err == nil {
			m.byIoctl = true
			return []Finding{m.hidden(Warning).
				because("nbdctl connects by ioctls then: of such a device dead connections are not replaced, " +
					"and nothing in the kernel shows whose it is")}
		}
		m.silent = errors.New("the control interface")
		return []Finding{m.hidden(Problem).because("and there is no device on which ioctls would do")}
	}
	if err != nil {
		m.silent = errors.New("an answer of the kernel")
		return []Finding{m.stuck(err)}
	}
	if first, known := m.network(); known && !first {
		return []Finding{warning("netlink answers, in a network namespace of its own").
			because("the kernel tells only the first one of connections that die, " +
				"so nbdctl watch shows no link-dead of other programs' devices here").
			do("nsenter --net=/proc/1/ns/net nbdctl watch")}
	}
	return []Finding{ok("netlink answers")}
}

// ask asks the kernel for its driver, by one interface.
func (m *Machine) ask(ctx context.Context, mode nbdnl.Mode) error {
	system := m.System
	system.Mode = mode
	c, err := system.NewClient()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, controlPatience, fmt.Errorf("no answer within %s", controlPatience))
	defer cancel()
	return errors.Join(c.Probe(ctx), c.Close())
}

// hidden is the finding about a kernel that has the driver and does not show it.
func (m *Machine) hidden(r Result) Finding {
	seen := "the netlink family of the loaded module does not show in this network namespace"
	if m.release().Before(6, 12, 0) {
		seen += ", as with kernels up to 6.1 in all but the first one"
	}
	return Finding{Result: r, Code: exit.Unsupported, Seen: seen}.do("nsenter --net=/proc/1/ns/net nbdctl …")
}

// stuck says who keeps the kernel from answering.
func (m *Machine) stuck(err error) Finding {
	f := problem(exit.Failure, "the kernel does not answer (%v)", err).
		because("generic netlink takes one command at a time, and some program's is stuck, " +
			"as a disconnect is whose server reads no more").
		do("end the process that serves the stuck device; one of nbdctl's: nbdctl kick DEVICE")
	if who := m.culprits(); who != "" {
		f.Seen += "; in a command of the driver: " + who
	}
	return f
}

// culprits names the threads that are in one of the driver's commands. Only a
// privileged process can see that, and only on kernels that show stacks.
func (m *Machine) culprits() string {
	stacks, err := filepath.Glob(m.path("proc/[0-9]*/task/[0-9]*/stack"))
	if err != nil {
		return ""
	}
	var who []string
	for _, path := range stacks {
		task := strings.TrimPrefix(filepath.Dir(path), m.path("/"))
		for line := range strings.Lines(m.read(task, "stack")) {
			if at := strings.Index(line, "nbd_genl_"); at >= 0 {
				pid := strings.Split(task, "/")[1]
				function, _, _ := strings.Cut(line[at:], "+")
				who = append(who, fmt.Sprintf("pid %s (%s, %s)", pid, m.read(task, "comm"), function))
			}
		}
	}
	return strings.Join(who, ", ")
}
