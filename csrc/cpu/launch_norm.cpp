#include "launch_norm.h"

#include <vector>

#include "launch.h"
#include "parallel.h"
#include "tensors.h"

namespace fastformer::cpu {
namespace {

// Outputs from here on are stored past the caches.
constexpr int64_t kPastCachesBytes = int64_t{16} << 20;

// A tensor seen as [rows, cols] with one stride between rows; a copy of it where its strides forbid that.
struct Rows {
  explicit Rows(const Tensor& given) : dtype(dtype_of(given)) {
    const std::optional<int64_t> stride = cpu::row_stride(given);
    if (stride.has_value()) {
      row_stride = *stride;
      data = given.const_data_ptr();
    } else {
      copy = torch::stable::contiguous(given);
      row_stride = given.size(given.dim() - 1);
      data = copy->const_data_ptr();
    }
  }

  DType dtype;
  int64_t row_stride;
  const void* data;
  std::optional<Tensor> copy;
};

// weight or bias as float32 [cols], filled with `absent` where there is none.
struct Columns {
  Columns(const std::optional<Tensor>& given, int64_t cols, float absent) {
    if (!given.has_value()) {
      made.assign(static_cast<size_t>(cols), absent);
      data = made.data();
      return;
    }
    const Rows row(*given);
    STD_TORCH_CHECK(given->numel() == cols, "weight and bias must have ", cols, " elements");
    if (row.dtype == DType::kFloat32 && !row.copy.has_value()) {
      data = static_cast<const float*>(row.data);
    } else {
      made.resize(static_cast<size_t>(cols));
      kernels().norm.to_float32(row.data, row.dtype, made.data(), cols);
      data = made.data();
    }
  }

  std::vector<float> made;
  const float* data;
};

struct Size {
  int64_t rows;
  int64_t cols;
};

Size size_of(IntHeaderOnlyArrayRef sizes) {
  STD_TORCH_CHECK(sizes.size() >= 1, "norm needs at least one dimension");
  Size size{1, sizes[sizes.size() - 1]};
  STD_TORCH_CHECK(size.cols >= 1, "norm needs at least one column");
  for (size_t d = 0; d + 1 < sizes.size(); ++d) size.rows *= sizes[d];
  return size;
}

void check_same_shape(const Tensor& tensor, IntHeaderOnlyArrayRef sizes, const char* name) {
  const IntHeaderOnlyArrayRef own = tensor.sizes();
  bool same = own.size() == sizes.size();
  for (size_t d = 0; same && d < sizes.size(); ++d) same = own[d] == sizes[d];
  STD_TORCH_CHECK(same, name, " must have the shape of the normalised tensor");
}

// Streaming stores write whole aligned vectors, of at most 64 bytes.
bool past_caches(const Size& size, int64_t outputs, DType dtype) {
  const int64_t row_bytes = size.cols * fastformer::size_of(dtype);
  return row_bytes % 64 == 0 && size.rows * row_bytes * outputs >= kPastCachesBytes;
}

template <typename Body>
void for_each_row_range(const Size& size, const Body& body) {
  if (size.rows * size.cols <= kElementsPerThread) {
    body(0, size.rows);
    return;
  }
  const int64_t grain = kElementsPerThread / size.cols;
  parallel_for(size.rows, grain, body);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_fwd(const Tensor& x, const std::optional<Tensor>& residual,
                                                    const std::optional<Tensor>& weight,
                                                    const std::optional<Tensor>& bias,
                                                    const std::optional<Tensor>& seed, bool rms, double eps,
                                                    double dropout_p) {
  const IntHeaderOnlyArrayRef sizes = x.sizes();
  const IntHeaderOnlyArrayRef row_sizes(sizes.data(), sizes.size() - 1);
  const Size size = size_of(sizes);
  const int64_t zero = 0;
  const IntHeaderOnlyArrayRef none(&zero, 1);
  const Rows x_rows(x);
  std::optional<Rows> residual_rows;
  DType dtype = x_rows.dtype;
  if (residual.has_value()) {
    check_same_shape(*residual, sizes, "residual");
    residual_rows.emplace(*residual);
    if (residual_rows->dtype != dtype) dtype = DType::kFloat32;
  }
  const Dropout dropout = dropout_of(dropout_p, seed);
  STD_TORCH_CHECK(dropout.threshold == 0 || residual.has_value(), "dropout needs a residual");
  const Columns weight_row(weight, size.cols, 1.0f);
  const Columns bias_row(bias, size.cols, 0.0f);

  Tensor out = empty(sizes, dtype);
  Tensor sum = empty(residual_rows ? sizes : none, dtype);
  Tensor mean = empty(rms ? none : row_sizes, DType::kFloat32);
  Tensor rstd = empty(row_sizes, DType::kFloat32);
  const NormFwd call{
      .x = x_rows.data,
      .residual = residual_rows ? residual_rows->data : nullptr,
      .weight = weight_row.data,
      .bias = bias_row.data,
      .out = out.mutable_data_ptr(),
      .sum = sum.mutable_data_ptr(),
      .mean = static_cast<float*>(mean.mutable_data_ptr()),
      .rstd = static_cast<float*>(rstd.mutable_data_ptr()),
      .cols = size.cols,
      .x_row_stride = x_rows.row_stride,
      .residual_row_stride = residual_rows ? residual_rows->row_stride : 0,
      .x_dtype = x_rows.dtype,
      .residual_dtype = residual_rows ? residual_rows->dtype : dtype,
      .rms = rms,
      .past_caches = past_caches(size, residual_rows ? 2 : 1, dtype),
      .eps = static_cast<float>(eps),
      .dropout = dropout,
  };
  const Kernels& kernel = kernels();
  for_each_row_range(size, [&](int64_t begin, int64_t end) { kernel.norm.fwd(call, begin, end); });
  return {std::move(out), std::move(sum), std::move(mean), std::move(rstd)};
}

namespace {

// Rows are cut into blocks by their number alone. Each block sums its share of dweight and dbias, and the
// shares are added in block order, so the result does not depend on the threads.
constexpr int64_t kMinRowsOfBlock = 32;
constexpr int64_t kMaxBlocks = 64;

int64_t rows_of_block(int64_t rows) {
  const int64_t even = (rows + kMaxBlocks - 1) / kMaxBlocks;
  return even > kMinRowsOfBlock ? even : kMinRowsOfBlock;
}

void add_shares(const float* shares, int64_t blocks, int64_t cols, float* total) {
  for (int64_t j = 0; j < cols; ++j) total[j] = 0.0f;
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t j = 0; j < cols; ++j) total[j] += shares[block * cols + j];
  }
}

void run_backward(const NormBwd& call, const Size& size, float* dweight, float* dbias) {
  const Kernels& kernel = kernels();
  const int64_t block_rows = rows_of_block(size.rows);
  const int64_t blocks = (size.rows + block_rows - 1) / block_rows;
  if (blocks <= 1) {
    kernel.norm.bwd(call, 0, size.rows, dweight, dbias);
    return;
  }
  const size_t share_count = static_cast<size_t>(blocks * size.cols);
  std::vector<float> dweight_shares(dweight != nullptr ? share_count : 0);
  std::vector<float> dbias_shares(dbias != nullptr ? share_count : 0);
  const int64_t grain = kElementsPerThread / (block_rows * size.cols);
  parallel_for(blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t last = (block + 1) * block_rows;
      kernel.norm.bwd(call, block * block_rows, last < size.rows ? last : size.rows,
                      dweight != nullptr ? dweight_shares.data() + block * size.cols : nullptr,
                      dbias != nullptr ? dbias_shares.data() + block * size.cols : nullptr);
    }
  });
  if (dweight != nullptr) add_shares(dweight_shares.data(), blocks, size.cols, dweight);
  if (dbias != nullptr) add_shares(dbias_shares.data(), blocks, size.cols, dbias);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_bwd(const Tensor& grad_out,
                                                    const std::optional<Tensor>& grad_sum, const Tensor& s,
                                                    const std::optional<Tensor>& weight, const Tensor& mean,
                                                    const Tensor& rstd, const std::optional<Tensor>& seed,
                                                    bool rms, double dropout_p, bool need_dweight,
                                                    bool need_dbias) {
  const IntHeaderOnlyArrayRef sizes = s.sizes();
  const Size size = size_of(sizes);
  const int64_t zero = 0;
  const IntHeaderOnlyArrayRef none(&zero, 1);
  const IntHeaderOnlyArrayRef columns(&size.cols, 1);
  const Rows s_rows(s);
  check_same_shape(grad_out, sizes, "grad_out");
  const Rows grad_out_rows(grad_out);
  STD_TORCH_CHECK(grad_out_rows.dtype == s_rows.dtype, "grad_out must have the dtype of s");
  std::optional<Rows> grad_sum_rows;
  if (grad_sum.has_value()) {
    check_same_shape(*grad_sum, sizes, "grad_sum");
    grad_sum_rows.emplace(*grad_sum);
    STD_TORCH_CHECK(grad_sum_rows->dtype == s_rows.dtype, "grad_sum must have the dtype of s");
  }
  const Tensor mean_row = mean.is_contiguous() ? mean : torch::stable::contiguous(mean);
  const Tensor rstd_row = rstd.is_contiguous() ? rstd : torch::stable::contiguous(rstd);
  STD_TORCH_CHECK(rstd_row.numel() == size.rows && (rms || mean_row.numel() == size.rows),
                  "mean and rstd must have one element a row");
  const Columns weight_row(weight, size.cols, 1.0f);
  const Dropout dropout = dropout_of(dropout_p, seed);
  const bool dropped = dropout.threshold != 0;

  Tensor ds = empty(sizes, s_rows.dtype);
  Tensor dx = empty(dropped ? sizes : none, s_rows.dtype);
  Tensor dweight = empty(need_dweight ? columns : none, DType::kFloat32);
  Tensor dbias = empty(need_dbias ? columns : none, DType::kFloat32);
  const NormBwd call{
      .grad_out = grad_out_rows.data,
      .grad_sum = grad_sum_rows ? grad_sum_rows->data : nullptr,
      .s = s_rows.data,
      .weight = weight_row.data,
      .mean = rms ? nullptr : mean_row.const_data_ptr<float>(),
      .rstd = rstd_row.const_data_ptr<float>(),
      .ds = ds.mutable_data_ptr(),
      .dx = dropped ? dx.mutable_data_ptr() : nullptr,
      .cols = size.cols,
      .grad_out_row_stride = grad_out_rows.row_stride,
      .grad_sum_row_stride = grad_sum_rows ? grad_sum_rows->row_stride : 0,
      .s_row_stride = s_rows.row_stride,
      .dtype = s_rows.dtype,
      .past_caches = past_caches(size, dropped ? 2 : 1, s_rows.dtype),
      .dropout = dropout,
  };
  run_backward(call, size, need_dweight ? static_cast<float*>(dweight.mutable_data_ptr()) : nullptr,
               need_dbias ? static_cast<float*>(dbias.mutable_data_ptr()) : nullptr);
  return {std::move(ds), std::move(dx), std::move(dweight), std::move(dbias)};
}

}  // namespace fastformer::cpu
