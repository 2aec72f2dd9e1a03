#include "kernels.h"
#include "norm.h"

namespace fastformer::cpu::FASTFORMER_ISA {

const NormKernels norm_kernels = {
    .to_float32 = &to_float32,
    .fwd = &norm_fwd,
    .bwd = &norm_bwd,
};

}  // namespace fastformer::cpu::FASTFORMER_ISA
