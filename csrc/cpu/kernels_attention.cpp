#include "attention_fwd.h"
#include "kernels.h"

namespace fastformer::cpu::FASTFORMER_ISA {

const AttentionKernels attention_kernels = {
    .fwd = &attention_fwd,
};

}  // namespace fastformer::cpu::FASTFORMER_ISA
