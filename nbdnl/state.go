package nbdnl

import "fmt"

// A State is what a device is doing, as far as the kernel shows it.
type State uint8

// The states of a device. Degraded, waiting and orphaned depend on the device's connections, or on
// whether its server is there, which the kernel does not show: they are for those who serve the
// device.
const (
	StateIdle          State = iota // free
	StateHeld                       // not connected, but open or claimed by somebody
	StateConnecting                 // being set up: it has an owner, but no size yet
	StateLive                       // connected
	StateDegraded                   // connected, some connections are dead
	StateWaiting                    // connected, all connections are dead, requests wait for a new one
	StateDisconnecting              // this Client's, and ended, but not released by its holders
	StateOrphaned                   // connected, and its server is gone
)

var stateNames = [...]string{"idle", "held", "connecting", "live", "degraded", "waiting", "disconnecting", "orphaned"}

// String returns the state's name: "idle", "held", "connecting", "live", "degraded", "waiting",
// "disconnecting" or "orphaned".
func (s State) String() string {
	if int(s) < len(stateNames) {
		return stateNames[s]
	}
	return fmt.Sprintf("State(%d)", uint8(s))
}

// MarshalText returns the state's name.
func (s State) MarshalText() ([]byte, error) {
	if int(s) >= len(stateNames) {
		return nil, fmt.Errorf("nbdnl: state %d has no name", uint8(s))
	}
	return []byte(s.String()), nil
}

// UnmarshalText sets the state by its name.
func (s *State) UnmarshalText(text []byte) error {
	for i, n := range stateNames {
		if n == string(text) {
			*s = State(i)
			return nil
		}
	}
	return fmt.Errorf("nbdnl: there is no device state %q", text)
}

// A Mode is the interface through which a device was connected.
type Mode uint8

// The modes of a device.
const (
	ModeNone    Mode = iota // not connected
	ModeNetlink             // by generic netlink
	ModeIoctl               // by ioctls on the open device
	ModeUnknown             // connected, but this kernel (before 5.14) does not show how
)

var modeNames = [...]string{"none", "netlink", "ioctl", "unknown"}

// String returns the mode's name: "none", "netlink", "ioctl" or "unknown".
func (m Mode) String() string {
	if int(m) < len(modeNames) {
		return modeNames[m]
	}
	return fmt.Sprintf("Mode(%d)", uint8(m))
}

// MarshalText returns the mode's name.
func (m Mode) MarshalText() ([]byte, error) {
	if int(m) >= len(modeNames) {
		return nil, fmt.Errorf("nbdnl: mode %d has no name", uint8(m))
	}
	return []byte(m.String()), nil
}
