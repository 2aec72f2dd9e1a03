// Compiled once per ISA level with -DFASTFORMER_ISA=<level>; see vec.h.
#include "kernels.h"

#include "attention_fwd.h"
#include "feed_forward.h"
#include "norm.h"

#define FASTFORMER_KERNELS_OF(level) FASTFORMER_PASTE(kernels_, level)
#define FASTFORMER_PASTE(prefix, level) prefix##level
#define FASTFORMER_NAME_OF(level) FASTFORMER_QUOTE(level)
#define FASTFORMER_QUOTE(level) #level

namespace fastformer::cpu {

const Kernels FASTFORMER_KERNELS_OF(FASTFORMER_ISA) = {
    .level = FASTFORMER_NAME_OF(FASTFORMER_ISA),
    .to_float32 = &FASTFORMER_ISA::to_float32,
    .norm_fwd = &FASTFORMER_ISA::norm_fwd,
    .norm_bwd = &FASTFORMER_ISA::norm_bwd,
    .attention_fwd = &FASTFORMER_ISA::attention_fwd,
    .feed_forward_operand_size = &FASTFORMER_ISA::feed_forward_operand_size,
    .feed_forward_pack = &FASTFORMER_ISA::feed_forward_pack,
    .feed_forward_hidden = &FASTFORMER_ISA::feed_forward_hidden,
    .feed_forward_output = &FASTFORMER_ISA::feed_forward_output,
};

}  // namespace fastformer::cpu
