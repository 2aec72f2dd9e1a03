// Runs the plan of attention_plan.h: which instantiation, on which stream. The upper half knows no torch, and
// is all that the device passes of nvcc see: torch's headers are parsed once instead of once for each
// architecture, and the tests compile this file to PTX by itself.
#include <cuda_runtime.h>

#include <atomic>

#include "attention_fwd.cuh"

namespace fastformer::cuda {

using AttentionKernel = void (*)(AttentionFwdParams);

template <DType kType, int kD>
AttentionKernel kernel_of(AttentionKind kind) {
  switch (kind) {
    case AttentionKind::kWhole:
      return attention_fwd_kernel<kType, kD, AttentionKind::kWhole>;
    case AttentionKind::kPadded:
      return attention_fwd_kernel<kType, kD, AttentionKind::kPadded>;
    case AttentionKind::kGeneral:
      return attention_fwd_kernel<kType, kD, AttentionKind::kGeneral>;
  }
  return nullptr;
}

template <DType kType>
AttentionKernel kernel_of(int block_d, AttentionKind kind) {
  switch (block_d) {
    case 32:
      return kernel_of<kType, 32>(kind);
    case 64:
      return kernel_of<kType, 64>(kind);
    case 96:
      return kernel_of<kType, 96>(kind);
    case 128:
      return kernel_of<kType, 128>(kind);
    case 192:
      return kernel_of<kType, 192>(kind);
    case 256:
      return kernel_of<kType, 256>(kind);
    default:
      return nullptr;
  }
}

AttentionKernel kernel_of(DType dtype, const AttentionPlan& plan) {
  return dtype == DType::kBFloat16 ? kernel_of<DType::kBFloat16>(plan.block_d, plan.kind)
                                   : kernel_of<DType::kFloat16>(plan.block_d, plan.kind);
}

}  // namespace fastformer::cuda
