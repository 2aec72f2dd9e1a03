// The sums over attention's scores; with SUMS_ALONE without what adds their shares.
#include "cuda/attention_sums.cuh"

namespace fastformer::cuda {

template __global__ void attention_sums_kernel<kScoreSumThreads>(const __grid_constant__ AttentionSumsParams);
#if !defined(SUMS_ALONE)
template __global__ void attention_add_shares_kernel<256>(const float*, int, int64_t, void*, DType);
#endif

}  // namespace fastformer::cuda
