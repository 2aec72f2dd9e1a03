// The kernels of one ISA level, as function pointers: the only way from launch code into code that was
// compiled with -m flags.
#pragma once

#include "../shapes.h"

namespace fastformer::cpu {

struct Kernels {
  const char* level;

  void (*to_float32)(const void* source, DType dtype, float* target, int64_t count);
  void (*norm_fwd)(const NormFwd& call, int64_t row_begin, int64_t row_end);
  // dweight and dbias [cols] receive the sums over these rows; null where they are not needed.
  void (*norm_bwd)(const NormBwd& call, int64_t row_begin, int64_t row_end, float* dweight, float* dbias);
};

#if defined(__x86_64__)
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx2;
extern const Kernels kernels_sse2;
#else
extern const Kernels kernels_baseline;
#endif

}  // namespace fastformer::cpu
