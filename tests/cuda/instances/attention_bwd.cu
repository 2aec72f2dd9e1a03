// One instantiation of attention's backward kernels, which TYPE, WIDTH and KIND name; with KEYS_ALONE that
// of the pass over keys.
#include "cuda/attention_bwd.cuh"

namespace fastformer::cuda {

template __global__ void
attention_bwd_keys_kernel<static_cast<DType>(TYPE), WIDTH, static_cast<BackwardKind>(KIND)>(
    const __grid_constant__ AttentionBwdParams);
#if !defined(KEYS_ALONE)
template __global__ void attention_bwd_rows_kernel<static_cast<DType>(TYPE)>(
    const __grid_constant__ AttentionBwdParams, int, int);
template __global__ void attention_bwd_row_sums_kernel<256>(const __grid_constant__ RowSums);
template __global__ void
attention_bwd_queries_kernel<static_cast<DType>(TYPE), WIDTH, static_cast<BackwardKind>(KIND)>(
    const __grid_constant__ AttentionBwdParams);
#endif

}  // namespace fastformer::cuda
