// The kernel that joins the splits of attention's few queries.
#include "cuda/attention_combine.cuh"

namespace fastformer::cuda {

template __global__ void attention_combine_kernel<kCombineThreads>(
    const __grid_constant__ AttentionFwdParams);

}  // namespace fastformer::cuda
