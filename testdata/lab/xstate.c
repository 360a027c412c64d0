// xstate.c is a library that the runner uml loads before User-Mode Linux (LD_PRELOAD). Its ptrace takes the place of the C
// library's.
//
// User-Mode Linux up to 6.12 keeps the vector registers of a process in a buffer whose size was fixed when it was built:
// 2696 bytes, up to AVX-512 and PKRU. The host takes such a state only whole (xstateregs_set in
// arch/x86/kernel/fpu/regset.c), and with AMX it has 11008 bytes. There PTRACE_SETREGSET ends with EFAULT, and the machine
// panics at its first process:
//
//	userspace - ptrace set fp regs failed, errno = 14
//	Kernel panic - not syncing: Attempted to kill init! exitcode=0x0000000b
//
// A request that the host refuses so is made again with the whole state: what the process has now, and over its beginning
// the bytes of the caller. What is not among these is AMX's, which no program inside uses: their kernel gives no permission
// (arch_prctl ARCH_REQ_XCOMP_PERM).
//
// It is built without libraries (see compile), and takes syscall and memcpy from whichever C library the program has.
#include <elf.h>
#include <errno.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

// Not on the stack, of which User-Mode Linux has 16 KiB. It has one processor and does not preempt its kernel, so nobody
// else is here meanwhile.
static char whole[64 << 10];

static long set_whole(pid_t pid, const struct iovec *part)
{
	struct iovec iov = { whole, sizeof(whole) };

	if (syscall(SYS_ptrace, PTRACE_GETREGSET, pid, NT_X86_XSTATE, &iov) < 0)
		return -1;
	memcpy(whole, part->iov_base, part->iov_len < iov.iov_len ? part->iov_len : iov.iov_len);
	return syscall(SYS_ptrace, PTRACE_SETREGSET, pid, NT_X86_XSTATE, &iov);
}

long ptrace(enum __ptrace_request request, ...)
{
	va_list args;
	va_start(args, request);
	pid_t pid = va_arg(args, pid_t);
	void *addr = va_arg(args, void *);
	void *data = va_arg(args, void *);
	va_end(args);

	// The system call stores what was peeked; the function of the C library returns it.
	long word, result;
	int peek = request >= PTRACE_PEEKTEXT && request <= PTRACE_PEEKUSER;
	result = syscall(SYS_ptrace, request, pid, addr, peek ? &word : data);
	if (peek && result >= 0) {
		errno = 0;
		return word;
	}
	int refused = result < 0 && (errno == EFAULT || errno == EINVAL);
	if (refused && request == PTRACE_SETREGSET && addr == (void *)NT_X86_XSTATE)
		return set_whole(pid, data);
	return result;
}
