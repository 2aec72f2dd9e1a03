// attention_fwd_cpu and paged_attention_fwd_cpu: their outputs, and the division of work over threads.
#include "launch_attention.h"

#include <algorithm>

#include "attention_call.h"
#include "launch.h"
#include "parallel.h"

namespace fastformer::cpu {
namespace {

// Query rows whose float32 outputs a work item may keep: 256 KB, which leaves room for keys in L2.
constexpr int64_t kChunkFloats = 65536;
// A multiple of every level's tile rows.
constexpr int64_t kChunkStep = 12;
constexpr int64_t kLeastChunkRows = 48;

// Chunks of at most kChunkFloats outputs, and more of them where the heads are too few for the threads.
void divide_work(AttentionFwd& fwd) {
  const Attention& call = fwd.attention;
  const int64_t most_rows = kChunkFloats / ((call.D_v + 15) / 16 * 16) / kChunkStep * kChunkStep;
  const int64_t heads = call.B * call.H;
  int64_t chunks = ceil_divide(call.M, most_rows);
  const int64_t threads = torch::stable::get_num_threads();
  if (threads > 1 && heads > 0 && heads < 4 * threads) {
    const int64_t wanted = ceil_divide(4 * threads, heads);
    const int64_t possible = ceil_divide(call.M, kLeastChunkRows);
    chunks = std::max(chunks, std::min(wanted, possible));
  }
  fwd.chunk_rows = ceil_divide(ceil_divide(call.M, std::max<int64_t>(chunks, 1)), kChunkStep) * kChunkStep;
  fwd.chunks = ceil_divide(call.M, std::max<int64_t>(fwd.chunk_rows, 1));
}

// out, lse, row_max, row_sum of a call with these queries.
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Attention& attention, const Tensor& query) {
  AttentionFwd fwd{};
  fwd.attention = attention;
  std::vector<int64_t> sizes = sizes_of(query);
  sizes.back() = attention.D_v;
  Tensor out = empty(sizes, attention.dtype);
  sizes.pop_back();
  if (attention.cu_seqlens_q) std::swap(sizes[0], sizes[1]);
  Tensor lse = empty(sizes, DType::kFloat32);
  Tensor row_max = empty(sizes, DType::kFloat32);
  Tensor row_sum = empty(sizes, DType::kFloat32);
  fwd.out = head_rows(out);
  fwd.lse = row_stats(lse);
  fwd.row_max = row_stats(row_max);
  fwd.row_sum = row_stats(row_sum);
  divide_work(fwd);
  const int64_t items = attention.B * attention.H * fwd.chunks;
  run_items(items, products_of_head(attention) / std::max<int64_t>(fwd.chunks, 1),
            [&](WorkQueue& queue) { kernels().attention.fwd(fwd, queue); });
  return {out, lse, row_max, row_sum};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_fwd(FASTFORMER_ATTENTION_PARAMETERS) {
  const AttentionCall call(FASTFORMER_ATTENTION_ARGUMENTS);
  return forward(call.attention, query);
}

std::tuple<Tensor, Tensor> paged_attention_fwd(const Tensor& query, const Tensor& key_pages,
                                               const Tensor& value_pages, const Tensor& page_table,
                                               const Tensor& lengths, const std::optional<Tensor>& sink,
                                               double scale, std::optional<int64_t> left,
                                               std::optional<int64_t> right, std::optional<double> softcap) {
  const PagedAttentionCall call(query, key_pages, value_pages, page_table, lengths, sink, scale, left, right,
                                softcap);
  const auto outputs = forward(call.attention, query);
  return {std::get<0>(outputs), std::get<1>(outputs)};
}

}  // namespace fastformer::cpu
