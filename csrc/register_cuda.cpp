// Binds the CUDA operators to the schemas that fastformer/ops defines.
#include <torch/csrc/stable/library.h>

#include "cuda/launch.h"

STABLE_TORCH_LIBRARY_IMPL(fastformer, CUDA, m) {
  m.impl("attention_fwd_cuda", TORCH_BOX(&fastformer::cuda::attention_fwd));
  m.impl("attention_bwd_cuda", TORCH_BOX(&fastformer::cuda::attention_bwd));
  m.impl("attention_weights_cuda", TORCH_BOX(&fastformer::cuda::attention_weights));
  m.impl("paged_attention_fwd_cuda", TORCH_BOX(&fastformer::cuda::paged_attention_fwd));
  m.impl("feed_forward_fwd_cuda", TORCH_BOX(&fastformer::cuda::feed_forward_fwd));
  m.impl("feed_forward_bwd_cuda", TORCH_BOX(&fastformer::cuda::feed_forward_bwd));
  m.impl("norm_fwd_cuda", TORCH_BOX(&fastformer::cuda::norm_fwd));
  m.impl("norm_bwd_cuda", TORCH_BOX(&fastformer::cuda::norm_bwd));
}
