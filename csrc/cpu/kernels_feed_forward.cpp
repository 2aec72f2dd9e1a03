#include "feed_forward.h"
#include "kernels.h"

namespace fastformer::cpu::FASTFORMER_ISA {

const FeedForwardKernels feed_forward_kernels = {
    .operand_size = &feed_forward_operand_size,
    .pack = &feed_forward_pack,
    .hidden = &feed_forward_hidden,
    .output = &feed_forward_output,
};

}  // namespace fastformer::cpu::FASTFORMER_ISA
