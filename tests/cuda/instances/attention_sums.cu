// The sums over attention's scores, of float32 where FLOAT32 is 1; with SUMS_ALONE without what adds their
// shares.
#include "cuda/attention_sums.cuh"

namespace fastformer::cuda {

template __global__ void attention_sums_kernel<kScoreSumThreads, FLOAT32>(
    const __grid_constant__ AttentionSumsParams);
#if !defined(SUMS_ALONE)
template __global__ void attention_add_shares_kernel<256>(const float*, int, int64_t, void*, DType);
#endif

}  // namespace fastformer::cuda
