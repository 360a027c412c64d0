//go:build !linux

package machine

import "os"

// DeviceNumber is for Linux.
func DeviceNumber(string) (string, bool) { return "", false }

// DeviceNumberIn is for Linux.
func DeviceNumberIn(*os.File, string) (string, bool) { return "", false }
