// One instantiation of attention's backward kernels, which TYPE, WIDTH and PLAIN name.
#include "cuda/attention_bwd.cuh"

namespace fastformer::cuda {

template __global__ void attention_bwd_keys_kernel<static_cast<DType>(TYPE), WIDTH, PLAIN>(
    const __grid_constant__ AttentionBwdParams);
template __global__ void attention_bwd_queries_kernel<static_cast<DType>(TYPE), WIDTH, PLAIN>(
    const __grid_constant__ AttentionBwdParams);

}  // namespace fastformer::cuda
