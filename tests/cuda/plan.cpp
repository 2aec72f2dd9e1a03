// The plans of csrc/cuda for ctypes: the tests take every choice of kernel and grid from where the launchers
// take it.
#include "cuda/attention_bwd_plan.h"
#include "cuda/attention_plan.h"
#include "cuda/attention_sums_plan.h"
#include "cuda/feed_forward_plan.h"
#include "cuda/norm_plan.h"

using namespace fastformer::cuda;

extern "C" {
int64_t size_of_NormFwdParams() { return sizeof(NormFwdParams); }
int64_t size_of_NormBwdParams() { return sizeof(NormBwdParams); }
int64_t size_of_AttentionFwdParams() { return sizeof(AttentionFwdParams); }
int64_t size_of_AttentionBwdParams() { return sizeof(AttentionBwdParams); }
int64_t size_of_AttentionSumsParams() { return sizeof(AttentionSumsParams); }
int64_t size_of_GemmParams() { return sizeof(GemmParams); }
int64_t size_of_ColumnSumsParams() { return sizeof(ColumnSumsParams); }
const char* kernel_name(int32_t kernel) { return name_of(static_cast<NormKernel>(kernel)); }
void plan_fwd(NormFwdParams* p, NormPlan* plan) { *plan = plan_norm_fwd(*p); }
void plan_bwd(NormBwdParams* p, int32_t multiprocessors, bool need_parameters, NormBwdPlan* plan) {
  *plan = plan_norm_bwd(*p, multiprocessors, need_parameters);
}
void describe_attention(AttentionFwdParams* p) { describe_scores(*p); }
void plan_attention(AttentionFwdParams* p, int32_t major, int32_t multiprocessors, int32_t few_queries,
                    AttentionPlan* plan) {
  *plan = plan_attention_fwd(*p, {major, multiprocessors}, few_queries < 0 ? kFewQueries : few_queries);
}
void divide_attention_keys(AttentionFwdParams* p, AttentionPlan* plan, int32_t splits) {
  divide_keys(*p, *plan, splits);
}
int32_t attention_splits(int64_t tiles, int64_t key_blocks, int64_t resident) {
  return best_splits(tiles, key_blocks, resident);
}
int32_t attention_combine_threads() { return kCombineThreads; }
bool attention_is_chosen(int32_t block_d, int32_t kind, int32_t dtype, int32_t major) {
  return is_chosen(block_d, static_cast<AttentionKind>(kind), static_cast<fastformer::DType>(dtype), major);
}
// Of an instantiation; returns its bytes of shared memory.
int32_t attention_tile(int32_t block_d, int32_t kind, int32_t dtype, AttentionTile* tile) {
  *tile = forward_tile(block_d, static_cast<AttentionKind>(kind), static_cast<fastformer::DType>(dtype));
  return tile->shared_bytes(block_d, static_cast<fastformer::DType>(dtype));
}
void plan_attention_backward(AttentionBwdParams* p, int64_t total_queries, int64_t most_shared,
                             AttentionBwdPlan* plan) {
  *plan = plan_attention_bwd(*p, total_queries, most_shared);
}
void plan_score_sums(AttentionSumsParams* p, int32_t target_B, int32_t target_H, AttentionSumsPlan* plan) {
  *plan = plan_attention_sums(*p, target_B, target_H);
}
bool attention_backward_is_chosen(int32_t block_d, int32_t kind, int32_t dtype, int64_t most_shared) {
  return is_chosen(block_d, static_cast<BackwardKind>(kind), static_cast<fastformer::DType>(dtype),
                   most_shared);
}
// Of an instantiation; returns its bytes of shared memory.
int32_t attention_backward_tile(int32_t block_d, int32_t kind, int32_t dtype, BackwardTile* tile) {
  *tile = backward_tile(block_d, static_cast<BackwardKind>(kind), static_cast<fastformer::DType>(dtype));
  return shared_bytes_of(*tile, block_d, static_cast<fastformer::DType>(dtype));
}
void plan_product(int32_t kernel, GemmParams* p, int32_t multiprocessors, GemmPlan* plan) {
  *plan = plan_gemm(static_cast<GemmKernel>(kernel), *p, multiprocessors);
}
void plan_sums(ColumnSumsParams* p, ColumnSumsPlan* plan) { *plan = plan_column_sums(*p); }
}
