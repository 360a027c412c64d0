package nbdnl

import "path/filepath"

// Birth returns what tells the present use of an index from those before and after it, also where the kernel keeps no identifiers: the
// number of a file that the driver makes when it connects a device and removes at its end (`pid` in sysfs, nbd_start_device and
// nbd_config_put), which kernfs gives to no other one. It is 0 if the device is not connected, or can't be seen. It does not block.
func Birth(index int) uint64 {
	// The file is not read: Linux 5.10 looks up a thread that may have exited.
	birth, err := fileNumber(filepath.Join((&System{}).block(index), "pid"))
	if err != nil {
		return 0
	}
	return birth
}
