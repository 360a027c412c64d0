// Package host is the process that serves one device: how it is started, what
// it records about itself, how others find it and talk to it, and how it ends.
//
// There is one such process per device, so that a crash hurts one device. It
// has a directory under the state root, named by the UUID of the device:
//
//	/run/nbdctl/<uuid>/state.json   what it serves (Record), readable by all
//	/run/nbdctl/<uuid>/lock         locked for as long as the process lives
//	/run/nbdctl/<uuid>/ctl          its control socket, for root
//	/run/nbdctl/<uuid>/log          its log, bounded; only for root if the backend has a secret
//
// Liveness is the lock and never the process id: a process id is reused, a
// lock goes with its holder. The directory goes with the device.
package host
