/* A bad disk, for LD_PRELOAD: looks at all that a process changes in one folder, and at the n-th
   change the disk is full or the process is killed. disk_arm begins; until then nothing happens. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define PATH 4096
enum { KILL, FULL };

static char folder[PATH];
static long changes, at;
static int mode, log_file = -1;

void disk_arm(const char *path, long n, int what, int log) {
  changes = 0, at = n, mode = what, log_file = log;
  strncpy(folder, path, PATH - 1);
}

/* Whether this change fails; `kind` and the path's last part go to the log. */
static int fails(const char *kind, const char *path, int takes_room) {
  size_t length = strlen(folder);
  if (!length || strncmp(path, folder, length)) return 0;
  changes++;
  if (log_file >= 0) dprintf(log_file, "%s %s\n", kind, path + length);
  if (!at || changes < at) return 0;
  if (mode == KILL) kill(getpid(), SIGKILL);
  if (!takes_room) return 0;
  errno = ENOSPC;
  return 1;
}

static const char *of_descriptor(int descriptor, char *path) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, PATH - 1);
  path[length < 0 ? 0 : length] = 0;
  return path;
}

static const char *of_name(int place, const char *name, char *path) {
  if (name[0] == '/') return name;
  char base[PATH];
  if (place == AT_FDCWD) {
    if (!getcwd(base, PATH)) return name;
  } else {
    of_descriptor(place, base);
  }
  snprintf(path, PATH, "%.2000s/%.2000s", base, name);
  return path;
}


#define ON_DESCRIPTOR(type, name, kind, room, parameters, ...) \
  type name parameters { \
    static type(*real) parameters; \
    if (!real) real = (type(*) parameters)dlsym(RTLD_NEXT, #name); \
    char path[PATH]; \
    if (*folder && fails(kind, of_descriptor(descriptor, path), room)) return -1; \
    return real(__VA_ARGS__); \
  }
ON_DESCRIPTOR(ssize_t, write, "write", 1, (int descriptor, const void *data, size_t size),
              descriptor, data, size)
ON_DESCRIPTOR(ssize_t, pwrite64, "write", 1,
              (int descriptor, const void *data, size_t size, off64_t offset), descriptor, data,
              size, offset)
ON_DESCRIPTOR(ssize_t, writev, "write", 1, (int descriptor, const struct iovec *data, int count),
              descriptor, data, count)
ON_DESCRIPTOR(int, fsync, "fsync", 1, (int descriptor), descriptor)
ON_DESCRIPTOR(int, ftruncate64, "truncate", 1, (int descriptor, off64_t size), descriptor, size)

#define ON_NAME(name, kind, room, place, path_name, parameters, ...) \
  int name parameters { \
    static int(*real) parameters; \
    if (!real) real = (int(*) parameters)dlsym(RTLD_NEXT, #name); \
    char path[PATH]; \
    if (*folder && fails(kind, of_name(place, path_name, path), room)) return -1; \
    return real(__VA_ARGS__); \
  }
ON_NAME(mkdir, "mkdir", 1, AT_FDCWD, given, (const char *given, mode_t rights), given, rights)
ON_NAME(mkdirat, "mkdir", 1, place, given, (int place, const char *given, mode_t rights), place,
        given, rights)
ON_NAME(rename, "rename", 0, AT_FDCWD, to, (const char *given, const char *to), given, to)
ON_NAME(renameat, "rename", 0, place, to,
        (int from, const char *given, int place, const char *to), from, given, place, to)
ON_NAME(unlink, "unlink", 0, AT_FDCWD, given, (const char *given), given)
ON_NAME(unlinkat, "unlink", 0, place, given, (int place, const char *given, int flags), place,
        given, flags)
ON_NAME(rmdir, "rmdir", 0, AT_FDCWD, given, (const char *given), given)
ON_NAME(chmod, "chmod", 0, AT_FDCWD, given, (const char *given, mode_t rights), given, rights)

#define OPEN(name, place, declared, ...) \
  int name declared { \
    static int (*real)(__VA_ARGS__, int, ...); \
    if (!real) real = dlsym(RTLD_NEXT, #name); \
    va_list rest; \
    va_start(rest, flags); \
    mode_t rights = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
    va_end(rest); \
    char path[PATH]; \
    if (*folder && flags & O_CREAT && fails("create", of_name(place, given, path), 1)) return -1;
OPEN(open, AT_FDCWD, (const char *given, int flags, ...), const char *)
    return real(given, flags, rights);
  }
OPEN(open64, AT_FDCWD, (const char *given, int flags, ...), const char *)
    return real(given, flags, rights);
  }
OPEN(openat, place, (int place, const char *given, int flags, ...), int, const char *)
    return real(place, given, flags, rights);
  }
OPEN(openat64, place, (int place, const char *given, int flags, ...), int, const char *)
    return real(place, given, flags, rights);
  }
