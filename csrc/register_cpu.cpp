#include <torch/csrc/stable/library.h>

#include "cpu/launch_attention.h"
#include "cpu/launch_feed_forward.h"
#include "cpu/launch_norm.h"

STABLE_TORCH_LIBRARY_IMPL(fastformer, CPU, m) {
  m.impl("attention_fwd_cpu", TORCH_BOX(&fastformer::cpu::attention_fwd));
  m.impl("attention_bwd_cpu", TORCH_BOX(&fastformer::cpu::attention_bwd));
  m.impl("attention_weights_cpu", TORCH_BOX(&fastformer::cpu::attention_weights));
  m.impl("feed_forward_bwd_cpu", TORCH_BOX(&fastformer::cpu::feed_forward_bwd));
  m.impl("feed_forward_fwd_cpu", TORCH_BOX(&fastformer::cpu::feed_forward_fwd));
  m.impl("norm_fwd_cpu", TORCH_BOX(&fastformer::cpu::norm_fwd));
  m.impl("norm_bwd_cpu", TORCH_BOX(&fastformer::cpu::norm_bwd));
  m.impl("paged_attention_fwd_cpu", TORCH_BOX(&fastformer::cpu::paged_attention_fwd));
}
