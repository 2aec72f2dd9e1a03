// One instantiation of attention's forward kernel, which TYPE, WIDTH and KIND name: a test that needs one
// does not wait for all.
#include "cuda/attention_fwd.cuh"

namespace fastformer::cuda {

template __global__ void
attention_fwd_kernel<static_cast<DType>(TYPE), WIDTH, static_cast<AttentionKind>(KIND)>(
    const __grid_constant__ AttentionFwdParams);

}  // namespace fastformer::cuda
