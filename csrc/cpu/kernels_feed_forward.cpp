#include "feed_forward_bwd.h"
#include "feed_forward_fwd.h"
#include "kernels.h"
#include "operands.h"

namespace fastformer::cpu::FASTFORMER_ISA {

const FeedForwardKernels feed_forward_kernels = {
    .operand_size = &operand_size,
    .pack_rows = &pack_operand_rows,
    .hidden = &feed_forward_hidden,
    .output = &feed_forward_output,
    .pack_transposed = &pack_operands_transposed,
    .column_sums = &column_sums,
    .hidden_bwd = &feed_forward_hidden_bwd,
    .input_bwd = &feed_forward_input_bwd,
    .weight_bwd = &weight_bwd,
    .from_float64 = &from_float64,
};

}  // namespace fastformer::cpu::FASTFORMER_ISA
