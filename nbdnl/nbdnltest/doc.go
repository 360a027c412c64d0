// Package nbdnltest helps to test programs that control NBD devices.
//
// [Kernel] is a fake of the kernel's driver at the lowest place where one can stand: it answers
// generic netlink messages, takes references to the sockets it is given, and shows its devices in a
// tree of files like those below /sys and /proc. It behaves as drivers/block/nbd.c does, also where
// that surprises: any opener makes a device busy, and a disconnected one stays until its last
// opener closes. It moves no data and keeps no time, and tells of dead connections when the test
// says so.
//
// Tests on the real driver begin with [RequireKernel], and [Main] as the body of TestMain finds
// what they leave behind.
package nbdnltest
