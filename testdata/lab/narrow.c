// narrow.c is a library for selftest, loaded before xstate.c. It makes this host one whose processor has more registers than
// User-Mode Linux knows of: what that reads and writes of them is made eight bytes shorter than the host's state, which the
// host then refuses as one with AMX does.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static char whole[64 << 10];

long ptrace(enum __ptrace_request request, ...)
{
	long (*next)(enum __ptrace_request, ...) = dlsym(RTLD_NEXT, "ptrace");
	va_list args;
	va_start(args, request);
	pid_t pid = va_arg(args, pid_t);
	void *addr = va_arg(args, void *);
	void *data = va_arg(args, void *);
	va_end(args);

	if ((request != PTRACE_GETREGSET && request != PTRACE_SETREGSET) || addr != (void *)NT_X86_XSTATE)
		return next(request, pid, addr, data);

	struct iovec host = { whole, sizeof(whole) };
	if (syscall(SYS_ptrace, PTRACE_GETREGSET, pid, addr, &host) < 0)
		return -1;
	struct iovec *iov = data;
	if (iov->iov_len > host.iov_len - 8)
		iov->iov_len = host.iov_len - 8;
	return next(request, pid, addr, iov);
}
