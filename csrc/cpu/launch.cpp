#include "launch.h"

#include <cstring>

namespace fastformer::cpu {
namespace {

#if defined(FASTFORMER_HAVE_AVX512) || defined(FASTFORMER_HAVE_AVX512BF16)
bool runs_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

// Null where the build left the level out or the machine lacks it.
const Kernels* level_named(const char* name) {
#if defined(FASTFORMER_HAVE_AVX512BF16)
  if (std::strcmp(name, "avx512bf16") == 0) {
    return runs_avx512() && __builtin_cpu_supports("avx512bf16") ? &kernels_avx512bf16 : nullptr;
  }
#endif
#if defined(FASTFORMER_HAVE_AVX512)
  if (std::strcmp(name, "avx512") == 0) return runs_avx512() ? &kernels_avx512 : nullptr;
#endif
#if defined(FASTFORMER_HAVE_AVX2)
  if (std::strcmp(name, "avx2") == 0) {
    const bool runs =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    return runs ? &kernels_avx2 : nullptr;
  }
#endif
#if defined(FASTFORMER_HAVE_SSE2)
  if (std::strcmp(name, "sse2") == 0) return &kernels_sse2;
#endif
#if defined(FASTFORMER_HAVE_BASELINE)
  if (std::strcmp(name, "baseline") == 0) return &kernels_baseline;
#endif
  return nullptr;
}

const Kernels* best_level() {
  const char* const best_first[] = {"avx512bf16", "avx512", "avx2", "sse2", "baseline"};
  for (const char* name : best_first) {
    if (const Kernels* level = level_named(name)) return level;
  }
  return nullptr;  // not reached: every build has sse2 or baseline
}

const Kernels* kernels_in_use = best_level();

}  // namespace

const Kernels& kernels() { return *kernels_in_use; }

const char* isa_level() { return kernels_in_use->level; }

bool set_isa_level(const char* level) {
  const Kernels* const named = level_named(level);
  if (named != nullptr) kernels_in_use = named;
  return named != nullptr;
}

}  // namespace fastformer::cpu
