/* What init needs of Linux's system calls on x86-64, without a C library. */
#pragma once

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long u64;
typedef unsigned long size_t;

/* asm/unistd_64.h */
#define SYS_read 0
#define SYS_write 1
#define SYS_open 2
#define SYS_close 3
#define SYS_mmap 9
#define SYS_ioctl 16
#define SYS_pause 34
#define SYS_dup2 33
#define SYS_socket 41
#define SYS_fork 57
#define SYS_execve 59
#define SYS_exit 60
#define SYS_wait4 61
#define SYS_chdir 80
#define SYS_mkdir 83
#define SYS_symlink 88
#define SYS_setsid 112
#define SYS_mknod 133
#define SYS_sync 162
#define SYS_mount 165
#define SYS_reboot 169
#define SYS_ioperm 173
#define SYS_getdents64 217
#define SYS_finit_module 313

#define ENOENT 2
#define EINTR 4
#define ENOEXEC 8
#define EACCES 13

#define O_RDONLY 0
#define O_RDWR 2
#define O_NOCTTY 0400
#define O_SYNC 04010000
#define O_DIRECTORY 0200000
#define O_CLOEXEC 02000000

static inline long syscall5(long number, u64 a, u64 b, u64 c, u64 d, u64 e)
{
	register u64 r10 __asm__("r10") = d;
	register u64 r8 __asm__("r8") = e;
	long result;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8)
			 : "rcx", "r11", "memory");
	return result;
}

static inline long syscall3(long number, u64 a, u64 b, u64 c)
{
	return syscall5(number, a, b, c, 0, 0);
}

/* A shared, writable page of what `fd` has at `offset`; an error as -errno. */
static inline long map_page(int fd, u64 offset)
{
	register u64 flags __asm__("r10") = 1; /* MAP_SHARED */
	register u64 file __asm__("r8") = (u64)fd;
	register u64 from __asm__("r9") = offset;
	long result;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(SYS_mmap), "D"(0), "S"(4096), "d"(3), "r"(flags), "r"(file), "r"(from)
			 : "rcx", "r11", "memory");
	return result;
}
