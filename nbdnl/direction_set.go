//go:build mips || mipsle || mips64 || mips64le || ppc64 || ppc64le

package nbdnl

const ioctlNone = 1 << 29 // _IO's direction, asm/ioctl.h of these architectures
