/* A heap with fences, for LD_PRELOAD: what torch's allocator gets from posix_memalign stands between two pages that
 * nobody may touch, and what was freed may be touched no more. FASTARCH_GUARD says which fence memory touches: "after"
 * (its last byte is the last of a page) or "before" (its first byte is the first of one). So one byte too far is a
 * crash. In the other direction up to a page is not guarded: run both.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { PAGE = 4096 };
static const size_t ARENA = (size_t)1 << 42; /* addresses only; none is used twice, so what was freed stays fenced */

static char* arena;
static size_t used;
static int touches_before;
static void (*next_free)(void*);

/* A block: a page that holds how many pages the memory has, a fence, the memory, a fence. */
static void start(void) {
  const char* where = getenv("FASTARCH_GUARD");
  touches_before = where && strcmp(where, "before") == 0;
  next_free = (void (*)(void*))dlsym(RTLD_NEXT, "free");
  char* all = mmap(NULL, ARENA, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (all == MAP_FAILED) abort();
  __atomic_store_n(&arena, all, __ATOMIC_RELEASE);
}

__attribute__((constructor)) static void constructor(void) { start(); }

int posix_memalign(void** result, size_t alignment, size_t bytes) {
  if (!arena) start();
  (void)alignment; /* what ends at a fence is aligned as well as its size is, no better: as slices of tensors are */
  const size_t pages = (bytes + PAGE - 1) / PAGE, whole = (pages + 3) * PAGE;
  char* block = arena + __atomic_fetch_add(&used, whole, __ATOMIC_RELAXED);
  char* memory = block + 2 * PAGE;
  if (block + whole > arena + ARENA) return ENOMEM;
  if (mprotect(block, PAGE, PROT_READ | PROT_WRITE)) return ENOMEM;
  if (pages && mprotect(memory, pages * PAGE, PROT_READ | PROT_WRITE)) return ENOMEM;
  *(size_t*)block = pages;
  *result = memory + (touches_before ? 0 : pages * PAGE - bytes);
  return 0;
}

void free(void* p) {
  if (!arena || (char*)p < arena || (char*)p >= arena + ARENA) {
    if (!next_free) next_free = (void (*)(void*))dlsym(RTLD_NEXT, "free");
    next_free(p);
    return;
  }
  char* block = (char*)((uintptr_t)p & ~(uintptr_t)(PAGE - 1)) - 2 * PAGE; /* p is in the first page of the memory */
  const size_t whole = (*(size_t*)block + 3) * PAGE;
  mmap(block, whole, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}
