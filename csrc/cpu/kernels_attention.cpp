#include "attention_bwd.h"
#include "attention_fwd.h"
#include "attention_sums.h"
#include "kernels.h"

namespace fastformer::cpu::FASTFORMER_ISA {

const AttentionKernels attention_kernels = {
    .block_keys = kBlockKeys,
    .fwd = &attention_fwd,
    .bwd_rows = &attention_bwd_rows,
    .bwd = &attention_bwd,
    .score_sum = &attention_score_sum,
    .sum_shares = &sum_shares,
};

}  // namespace fastformer::cpu::FASTFORMER_ISA
