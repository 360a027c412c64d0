// Package buse makes a backend of a driver that was written for the library buse-go
// (github.com/samalba/buse-go and its forks). The driver stays as it is. What was
//
//	dev, err := buse.CreateDevice("/dev/nbd0", size, driver)
//	if err != nil { … }
//	go dev.Connect()
//	…
//	dev.Disconnect()
//
// becomes, with the buse of this module and its package blockdev,
//
//	disk, err := buse.New(driver, int64(size))
//	if err != nil { … }
//	dev, err := blockdev.Connect(ctx, disk, blockdev.Options{})
//	if err != nil { … }
//	…
//	err = errors.Join(dev.Close(), disk.Close())
//
// Connect picks a free device, which dev.Path names, and returns when the device can be used:
// there is no goroutine to start. blockdev.ConnectIndex(ctx, 0, …) asks for /dev/nbd0. A block
// size that a fork was given is blockdev.Options.BlockSize now, and a driver that takes no writes
// is attached with blockdev.Options.ReadOnly.
//
// # What stays
//
// [New] calls one method at a time, as the loop of that library did. Each call gets a buffer that
// belongs to the driver for good, so a driver may keep it or change it, and the buffer of a read
// holds zeros at first, so a driver may leave out what was never written. That costs an allocation
// and a copy for each request. A driver that can do without is passed to [NewConcurrent].
//
// # What is new
//
//   - Flush is called. The library did not tell the kernel of it, so no flush ever came. When Flush
//     returns nil, every write before it has to be on stable storage.
//   - Reads and writes are longer: up to 1 MiB from a kernel, up to 32 MiB from a client of package
//     server. [backends.BlockSizes] limits them, in a wrapper.
//   - The error of a driver has a meaning: what is or wraps a [syscall.Errno], as ENOSPC, reaches
//     the client as that, and everything else as EIO. The library made EPERM of all.
//   - A panic of the driver fails one request, and the device goes on.
//   - Disconnect is called by Close of the [Backend], not when the kernel lets go of the device.
//     Close the device first.
package buse
