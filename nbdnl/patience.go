package nbdnl

import (
	"slices"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl/holder"
)

// How long those who hold a device are waited for. Few mean to keep it: most are udev's workers,
// which look at every device that changes, before a connect, before a detach, and after it.
const (
	// connectPatience is for a device that is not connected, but open.
	connectPatience = 2 * time.Second
	// detachPatience is for processes that have a device open which is to be detached.
	detachPatience = time.Second
	// commandPatience bounds the disconnect itself, which the kernel may not come back from: it
	// sends to the server, which may have stopped reading (nbd.c, send_disconnects).
	commandPatience = time.Minute
	// releasePatience is for those who have it open when it is disconnected.
	releasePatience = 2 * time.Second
	// proberPatience takes the place of these where only probers are left, who will let go however
	// slow the machine is.
	proberPatience = 15 * time.Second
	// reconnectPatience is for the kernel to notice that a connection is dead which is to be
	// replaced.
	reconnectPatience = 3 * time.Second
	// forcePatience bounds each step before a forced disconnect that needs the device's server.
	forcePatience = 5 * time.Second
)

// proberNames are the names of the processes that look at devices on their own account.
var proberNames = []string{"(udev-worker)", "systemd-udevd", "udevd", "blkid"}

// patience returns how long the holders of a device are worth waiting for, when it is usual
// otherwise. Mounts and their like do not go by themselves.
func patience(holders []holder.Holder, usual time.Duration) time.Duration {
	probers := 0
	for _, h := range holders {
		if h.Kind != holder.Process {
			return 0
		}
		if slices.Contains(proberNames, h.Comm) {
			probers++
		}
	}
	if probers > 0 && probers == len(holders) {
		return proberPatience
	}
	return usual
}
