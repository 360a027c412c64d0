//go:build !(mips || mipsle || mips64 || mips64le || ppc64 || ppc64le)

package nbdnl

const ioctlNone = 0 // _IO's direction, asm-generic/ioctl.h
