package doctor

import (
	"context"
	"fmt"

	"github.com/nbdctl/nbdctl/nbdnl"
)

// held tells which devices are not connected and yet open. It needs no privilege.
func (m *Machine) held(ctx context.Context) []Finding {
	if m.silent != nil {
		return []Finding{unknown(m.silent.Error())}
	}
	c, err := m.System.NewClient()
	if err != nil {
		return []Finding{unknown(err.Error())}
	}
	defer c.Close()
	ctx, cancel := context.WithTimeoutCause(ctx, controlPatience, fmt.Errorf("no answer within %s", controlPatience))
	defer cancel()
	devices, err := c.Devices(ctx)
	if err != nil {
		return []Finding{unknown("an answer of the kernel: " + err.Error())}
	}
	var findings []Finding
	more := 0
	for _, d := range devices {
		if d.State != nbdnl.StateHeld {
			continue
		}
		if len(findings) == maxHeld {
			more++
			continue
		}
		who := "somebody who can't be seen from here"
		if holders, err := m.System.Holders().Find(ctx, d.Index); err == nil && len(holders) > 0 {
			who = holders[0].String()
		}
		findings = append(findings, warning("nbd%d is open though not connected: %s", d.Index, who).
			because("it can't be connected, and nbdctl connect without --device takes another one").
			do("end or mend what has it open"))
	}
	if more > 0 {
		findings = append(findings, warning("%d more devices are open though not connected", more))
	}
	if findings == nil {
		return []Finding{ok("no idle device is open")}
	}
	return findings
}

// maxHeld bounds the devices that are named: to find out who holds one takes a
// look at all processes.
const maxHeld = 4
