// What the compiler calls before every load and store of a kernel compiled with -fsanitize=thread. Its own runtime is
// not linked: these are the checks of this emulator. Kernels' memcpy and memset come here as well (build.py).
#include <cstring>

#include "emulator/runtime.h"

using namespace simt;

namespace {

uintptr_t number(const void* at) { return reinterpret_cast<uintptr_t>(at); }

}  // namespace

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
// Of a static local variable's guard. Kernels use CUDA's atomics; std::atomic in one does not link.
unsigned char __tsan_atomic8_load(const volatile unsigned char* at, int) { return *at; }

#define SMOLVLA_SIMT_ACCESS(bytes)                                                                             \
    void __tsan_read##bytes(void* at) {                                                                        \
        access_aligned(number(at), bytes, READ, Path::l1, SMOLVLA_SIMT_SITE);                                  \
    }                                                                                                          \
    void __tsan_write##bytes(void* at) {                                                                       \
        access_aligned(number(at), bytes, WRITE, Path::l1, SMOLVLA_SIMT_SITE);                                 \
    }                                                                                                          \
    void __tsan_unaligned_read##bytes(void* at) { access(number(at), bytes, READ, Path::l1, SMOLVLA_SIMT_SITE); } \
    void __tsan_unaligned_write##bytes(void* at) { access(number(at), bytes, WRITE, Path::l1, SMOLVLA_SIMT_SITE); }

SMOLVLA_SIMT_ACCESS(1)
SMOLVLA_SIMT_ACCESS(2)
SMOLVLA_SIMT_ACCESS(4)
SMOLVLA_SIMT_ACCESS(8)
SMOLVLA_SIMT_ACCESS(16)

void __tsan_read_range(void* at, unsigned long bytes) {
    if (bytes) access(number(at), bytes, READ, Path::l1, SMOLVLA_SIMT_SITE);
}
void __tsan_write_range(void* at, unsigned long bytes) {
    if (bytes) access(number(at), bytes, WRITE, Path::l1, SMOLVLA_SIMT_SITE);
}

void* smolvla_simt_memmove(void* to, const void* from, size_t bytes) {
    if (bytes) {
        access(number(from), bytes, READ, Path::l1, SMOLVLA_SIMT_SITE);
        access(number(to), bytes, WRITE, Path::l1, SMOLVLA_SIMT_SITE);
    }
    return std::memmove(to, from, bytes);
}
void* smolvla_simt_memcpy(void* to, const void* from, size_t bytes) {
    if (bytes) {
        access(number(from), bytes, READ, Path::l1, SMOLVLA_SIMT_SITE);
        access(number(to), bytes, WRITE, Path::l1, SMOLVLA_SIMT_SITE);
    }
    return std::memcpy(to, from, bytes);
}
void* smolvla_simt_memset(void* to, int value, size_t bytes) {
    if (bytes) access(number(to), bytes, WRITE, Path::l1, SMOLVLA_SIMT_SITE);
    return std::memset(to, value, bytes);
}

}  // extern "C"
