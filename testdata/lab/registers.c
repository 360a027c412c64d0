// registers.c is a program for selftest. The threads of two processes hold values of their own in the vector registers, yield
// the processor to each other, and look whether their values are still there. In User-Mode Linux the threads of a process
// share one process of the host, so that only PTRACE_SETREGSET gives each its registers back.
//
//	registers [N]
//
// The last N bytes of the last register may be lost.
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { threads = 4, rounds = 3000 };

static size_t lost;

#define ALL(op) \
	op(0) op(1) op(2) op(3) op(4) op(5) op(6) op(7) op(8) op(9) op(10) op(11) op(12) op(13) op(14) op(15)

// hold_xmm and hold_ymm load the registers, call sched_yield (24), and store them.
#define LOAD_XMM(n) "movups 16*" #n "(%[in]), %%xmm" #n "\n"
#define STORE_XMM(n) "movups %%xmm" #n ", 16*" #n "(%[out])\n"
#define LOAD_YMM(n) "vmovups 32*" #n "(%[in]), %%ymm" #n "\n"
#define STORE_YMM(n) "vmovups %%ymm" #n ", 32*" #n "(%[out])\n"
#define CLOBBER \
	"rax", "rcx", "r11", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", \
		"xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"

static void hold_xmm(const void *in, void *out)
{
	__asm__ volatile(ALL(LOAD_XMM) "mov $24, %%eax\nsyscall\n" ALL(STORE_XMM)
			 : : [in] "r"(in), [out] "r"(out) : CLOBBER);
}

__attribute__((target("avx"))) static void hold_ymm(const void *in, void *out)
{
	__asm__ volatile(ALL(LOAD_YMM) "mov $24, %%eax\nsyscall\n" ALL(STORE_YMM)
			 : : [in] "r"(in), [out] "r"(out) : CLOBBER);
}

static void *run(void *arg)
{
	uint8_t in[16 * 32], out[16 * 32];
	int avx = __builtin_cpu_supports("avx");
	size_t size = avx ? sizeof(in) : 16 * 16;

	for (int round = 0; round < rounds; round++) {
		for (size_t i = 0; i < size; i++)
			in[i] = (uint8_t)((uintptr_t)arg * 41 + (size_t)round * 7 + i * 3);
		(avx ? hold_ymm : hold_xmm)(in, out);
		for (size_t i = 0; i < size - lost; i++) {
			if (out[i] == in[i])
				continue;
			printf("thread %d, round %d: byte %zu of the registers is %#x, was %#x\n",
			       (int)(uintptr_t)arg, round, i, out[i], in[i]);
			return arg;
		}
	}
	return NULL;
}

int main(int argc, char **argv)
{
	lost = argc > 1 ? strtoul(argv[1], NULL, 10) : 0;
	pthread_t thread[threads];
	int bad = 0, status = 0;
	pid_t child = fork();

	for (uintptr_t i = 0; i < threads; i++)
		if (pthread_create(&thread[i], NULL, run, (void *)(1 + i + (child ? threads : 0))) != 0)
			return 1;
	for (int i = 0; i < threads; i++) {
		void *result;
		pthread_join(thread[i], &result);
		bad |= result != NULL;
	}
	if (child == 0)
		return bad;
	waitpid(child, &status, 0);
	return bad || status != 0;
}
