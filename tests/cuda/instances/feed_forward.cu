// feed_forward's kernels for the type that TYPE names; with KERNEL one product's alone.
#include "cuda/feed_forward.cuh"

namespace fastformer::cuda {

#if defined(KERNEL)
template __global__ void feed_forward_kernel<static_cast<DType>(TYPE), static_cast<GemmKernel>(KERNEL)>(
    const __grid_constant__ GemmParams);
#else
#define INSTANTIATE(name)                                                                   \
  template __global__ void feed_forward_kernel<static_cast<DType>(TYPE), GemmKernel::name>( \
      const __grid_constant__ GemmParams);
INSTANTIATE(kHidden)
INSTANTIATE(kLinear)
INSTANTIATE(kHiddenGradient)
INSTANTIATE(kInputGradient)
INSTANTIATE(kWeightGradient)
template __global__ void column_sums_kernel<kSumLines>(const __grid_constant__ ColumnSumsParams);
#endif

}  // namespace fastformer::cuda
