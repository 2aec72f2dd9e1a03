// The table of one ISA level. This file and kernels_*.cpp are compiled once per level with
// -DFASTFORMER_ISA=<level>; see vec.h.
#include "kernels.h"
#include "peak.h"

#define FASTFORMER_KERNELS_OF(level) FASTFORMER_PASTE(kernels_, level)
#define FASTFORMER_PASTE(prefix, level) prefix##level
#define FASTFORMER_NAME_OF(level) FASTFORMER_QUOTE(level)
#define FASTFORMER_QUOTE(level) #level

namespace fastformer::cpu {

const Kernels FASTFORMER_KERNELS_OF(FASTFORMER_ISA) = {
    .level = FASTFORMER_NAME_OF(FASTFORMER_ISA),
    .norm = FASTFORMER_ISA::norm_kernels,
    .attention = FASTFORMER_ISA::attention_kernels,
    .feed_forward = FASTFORMER_ISA::feed_forward_kernels,
    .run_fma = &FASTFORMER_ISA::run_fma,
};

}  // namespace fastformer::cpu
