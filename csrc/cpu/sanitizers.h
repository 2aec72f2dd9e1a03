// What masked and streaming intrinsics do with memory, told to the sanitizer of a sanitised build: the
// compiler instruments plain accesses only. Nothing in other builds.
#pragma once

#include <stdint.h>

#if defined(__SANITIZE_ADDRESS__)
extern "C" void __asan_loadN(void* p, intptr_t bytes);
extern "C" void __asan_storeN(void* p, intptr_t bytes);
#define FASTFORMER_SANITIZER_READS __asan_loadN
#define FASTFORMER_SANITIZER_WRITES __asan_storeN
#elif defined(__SANITIZE_THREAD__)
extern "C" void __tsan_read_range(void* p, intptr_t bytes);
extern "C" void __tsan_write_range(void* p, intptr_t bytes);
#define FASTFORMER_SANITIZER_READS __tsan_read_range
#define FASTFORMER_SANITIZER_WRITES __tsan_write_range
#endif

namespace fastformer::cpu::FASTFORMER_ISA {

// p[0] to p[n - 1] are about to be read.
template <typename T>
static inline __attribute__((always_inline)) void tell_reads([[maybe_unused]] const T* p,
                                                             [[maybe_unused]] int n) {
#if defined(FASTFORMER_SANITIZER_READS)
  FASTFORMER_SANITIZER_READS(const_cast<T*>(p), n * static_cast<intptr_t>(sizeof(T)));
#endif
}

template <typename T>
static inline __attribute__((always_inline)) void tell_writes([[maybe_unused]] T* p, [[maybe_unused]] int n) {
#if defined(FASTFORMER_SANITIZER_WRITES)
  FASTFORMER_SANITIZER_WRITES(p, n * static_cast<intptr_t>(sizeof(T)));
#endif
}

}  // namespace fastformer::cpu::FASTFORMER_ISA
