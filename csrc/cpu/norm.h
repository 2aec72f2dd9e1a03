// LayerNorm and RMSNorm of rows, with the residual addition and the dropout before it.
//
//   s = residual + dropout(x)    mean = sum(s) / C    rstd = 1 / sqrt(sum((s - mean)^2) / C + eps)
//   out = (s - mean) * rstd * weight + bias
//
// RMSNorm is the same with mean = 0. s is the sum as it is returned, rounded to its dtype, so that backward,
// which reads that, differentiates what was computed here. It stays in a float32 scratch row between the
// passes, so memory is read and written once.
//
// Denormals are not flushed here: `sum` must have the same bits on every backend.
#pragma once

#include "philox_vec.h"
#include "vec.h"
#include "worker.h"

namespace fastformer::cpu::FASTFORMER_ISA {

// Which lanes of a vector lie inside the row.
struct All {};
struct First {
  int n;
};

template <typename T>
FASTFORMER_INLINE F32 load(const T* p, All) {
  return load(p);
}
template <typename T>
FASTFORMER_INLINE F32 load(const T* p, First lanes) {
  return load_n(p, lanes.n);
}
template <typename T>
FASTFORMER_INLINE void store(T* p, F32 x, All) {
  store(p, x);
}
template <typename T>
FASTFORMER_INLINE void store(T* p, F32 x, First lanes) {
  store_n(p, x, lanes.n);
}
FASTFORMER_INLINE F32 zero_beyond(F32 x, All) { return x; }
FASTFORMER_INLINE F32 zero_beyond(F32 x, First lanes) { return select(lane_index() < lanes.n, x, F32{}); }

template <bool kPastCaches, typename T, typename Lanes>
FASTFORMER_INLINE void store_output(T* p, F32 x, Lanes lanes) {
  if constexpr (kPastCaches) {
    stream(p, x);  // the launcher sees to it that rows consist of whole, aligned vectors
  } else {
    store(p, x, lanes);
  }
}

constexpr int kUnroll = 4;

// body(column, lanes, u) for every vector of a row; u < kUnroll names one of the accumulators that keep
// consecutive additions apart.
template <typename Body>
FASTFORMER_INLINE void for_each_vector(int64_t cols, Body body) {
  int64_t j = 0;
  for (; j + kUnroll * kLanes <= cols; j += kUnroll * kLanes) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) body(j + u * kLanes, All{}, u);
  }
  for (; j + kLanes <= cols; j += kLanes) body(j, All{}, 0);
  if (j < cols) body(j, First{static_cast<int>(cols - j)}, 1);
}

FASTFORMER_INLINE float reduce_add(const F32 (&partial)[kUnroll]) {
  return reduce_add((partial[0] + partial[1]) + (partial[2] + partial[3]));
}

template <typename T>
static void widen_row(const T* source, float* target, int64_t cols) {
  for_each_vector(cols, [&](int64_t j, auto lanes, int) __attribute__((always_inline)) {
    store(target + j, load(source + j, lanes), lanes);
  });
}

static void to_float32(const void* source, DType dtype, float* target, int64_t count) {
  if (dtype == DType::kFloat32) {
    widen_row(static_cast<const float*>(source), target, count);
  } else if (dtype == DType::kBFloat16) {
    widen_row(static_cast<const BFloat16*>(source), target, count);
  } else {
    widen_row(static_cast<const Float16*>(source), target, count);
  }
}

// Row pointers of the instance's type T. Where dtypes differ the instance is the float32 one, and rows of
// another dtype are converted into `converted` first.
template <typename T>
FASTFORMER_INLINE const T* row_as(const void* base, DType dtype, int64_t offset, int64_t cols,
                                  float* converted) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (dtype != DType::kFloat32) {
      to_float32(static_cast<const char*>(base) + offset * size_of(dtype), dtype, converted, cols);
      return converted;
    }
  }
  return static_cast<const T*>(base) + offset;
}

// One decision a column, in column order. Philox makes 8 columns from a counter and kLanes counters at once.
static void draw_decisions(const Dropout& dropout, int64_t row, int64_t cols, uint16_t* decisions) {
  const U32 zero{};
  const U32 row_word = splat(static_cast<uint32_t>(row));
  for (int64_t j = 0; j < cols; j += 8 * kLanes) {
    const U32 counter = interleaved_index() + static_cast<uint32_t>(j / 8);
    const PhiloxVectors words = philox4x32_7(dropout.seed, counter, row_word, zero, splat(uint32_t{1}));
    uint32_t interleaved[4 * kLanes];
    store_interleaved(interleaved, words);
    __builtin_memcpy(decisions + j, interleaved, sizeof interleaved);
  }
}

// Float words that hold the decisions of a row; whole blocks of 8 * kLanes are written.
FASTFORMER_INLINE int64_t decision_floats(int64_t cols) {
  return (cols + 8 * kLanes - 1) / (8 * kLanes) * (4 * kLanes);
}

// A dropped element is +0 whatever it was: selected, not multiplied.
FASTFORMER_INLINE F32 drop(F32 x, const uint16_t* decisions, const Dropout& dropout) {
  return select(kept(decisions, dropout.threshold), x * dropout.scale, F32{});
}

// s of one row, as T rounds it, into s_row and `sum`; returns its total.
template <typename T, bool kDropout, bool kPastCaches>
static float add_residual(const T* x, const T* residual, const uint16_t* decisions, const Dropout& dropout,
                          int64_t cols, float* s_row, T* sum) {
  F32 total[kUnroll]{};
  for_each_vector(cols, [&](int64_t j, auto lanes, int u) __attribute__((always_inline)) {
    F32 branch = load(x + j, lanes);
    if constexpr (kDropout) branch = drop(branch, decisions + j, dropout);
    const F32 s = rounded(load(residual + j, lanes) + branch, T{});
    store(s_row + j, s, lanes);
    store_output<kPastCaches>(sum + j, s, lanes);
    total[u] += s;
  });
  return reduce_add(total);
}

// The plain norm's s: x itself, or x widened into s_row. Returns its total.
template <typename T>
static float take_row(const T* x, int64_t cols, float* s_row) {
  F32 total[kUnroll]{};
  for_each_vector(cols, [&](int64_t j, auto lanes, int u) __attribute__((always_inline)) {
    const F32 s = load(x + j, lanes);
    if constexpr (sizeof(T) != sizeof(float)) store(s_row + j, s, lanes);
    total[u] += s;
  });
  return reduce_add(total);
}

static float centred_squares(const float* s, float mean, int64_t cols) {
  F32 total[kUnroll]{};
  for_each_vector(cols, [&](int64_t j, auto lanes, int u) __attribute__((always_inline)) {
    const F32 centred = zero_beyond(load(s + j, lanes) - mean, lanes);
    total[u] = fma(centred, centred, total[u]);
  });
  return reduce_add(total);
}

template <typename T, bool kPastCaches>
static void write_normed(const float* s, float mean, float rstd, const float* weight, const float* bias,
                         int64_t cols, T* out) {
  for_each_vector(cols, [&](int64_t j, auto lanes, int) __attribute__((always_inline)) {
    const F32 normed = (load(s + j, lanes) - mean) * rstd;
    store_output<kPastCaches>(out + j, fma(normed, load(weight + j, lanes), load(bias + j, lanes)), lanes);
  });
}

template <typename T, bool kPastCaches>
static void norm_fwd_rows(const NormFwd& call, int64_t row_begin, int64_t row_end) {
  const int64_t cols = call.cols;
  const int64_t row_floats = (cols + 15) / 16 * 16;
  const Scratch scratch(3 * row_floats + decision_floats(cols));
  float* const s_row = scratch.data();
  float* const x_converted = s_row + row_floats;
  float* const residual_converted = x_converted + row_floats;
  uint16_t* const decisions = reinterpret_cast<uint16_t*>(residual_converted + row_floats);

  for (int64_t row = row_begin; row < row_end; ++row) {
    const T* const x = row_as<T>(call.x, call.x_dtype, row * call.x_row_stride, cols, x_converted);
    const float* s = s_row;
    float total;
    if (call.residual == nullptr) {
      total = take_row(x, cols, s_row);
      if constexpr (sizeof(T) == sizeof(float)) s = x;
    } else {
      const T* const residual = row_as<T>(call.residual, call.residual_dtype, row * call.residual_row_stride,
                                          cols, residual_converted);
      T* const sum = static_cast<T*>(call.sum) + row * cols;
      if (call.dropout.threshold == 0) {
        total = add_residual<T, false, kPastCaches>(x, residual, nullptr, call.dropout, cols, s_row, sum);
      } else {
        draw_decisions(call.dropout, row, cols, decisions);
        total = add_residual<T, true, kPastCaches>(x, residual, decisions, call.dropout, cols, s_row, sum);
      }
    }
    const float mean = call.rms ? 0.0f : total / static_cast<float>(cols);
    const float variance = centred_squares(s, mean, cols) / static_cast<float>(cols);
    const float rstd = 1.0f / sqrt(variance + call.eps);
    write_normed<T, kPastCaches>(s, mean, rstd, call.weight, call.bias, cols,
                                 static_cast<T*>(call.out) + row * cols);
    if (!call.rms) call.mean[row] = mean;
    call.rstd[row] = rstd;
  }
  if constexpr (kPastCaches) stream_fence();
}

template <typename T>
static void norm_fwd_as(const NormFwd& call, int64_t row_begin, int64_t row_end) {
  if (call.past_caches) {
    norm_fwd_rows<T, true>(call, row_begin, row_end);
  } else {
    norm_fwd_rows<T, false>(call, row_begin, row_end);
  }
}

static void norm_fwd(const NormFwd& call, int64_t row_begin, int64_t row_end) {
  const bool one_dtype = call.residual == nullptr || call.residual_dtype == call.x_dtype;
  if (one_dtype && call.x_dtype == DType::kBFloat16) {
    norm_fwd_as<BFloat16>(call, row_begin, row_end);
  } else if (one_dtype && call.x_dtype == DType::kFloat16) {
    norm_fwd_as<Float16>(call, row_begin, row_end);
  } else {
    norm_fwd_as<float>(call, row_begin, row_end);
  }
}

// Backward of one row, with g = grad_out * weight and xhat = (s - mean) * rstd:
//
//   ds = rstd * (g - sum(g) / C - xhat * sum(g * xhat) / C) + grad_sum
//   dweight = sum over rows of grad_out * xhat,  dbias = sum over rows of grad_out
//
// RMSNorm has no term of sum(g), since there the mean is not subtracted.
//
// The formula takes sum(xhat) = 0 for granted. The saved mean is rounded, so in a row of nearly equal
// elements xhat would hold that error times a large rstd. What is left of the mean, sum(s - mean) / C, is
// therefore taken off as well.

template <typename T>
struct BackwardRow {
  const T* grad_out;
  const T* grad_sum;  // or null
  const T* s;
  const uint16_t* decisions;
  T* ds;
  T* dx;  // or null
  float mean;
  float mean_rest;  // sum(s - mean) / C
  float rstd;
  float mean_g;       // sum(g) / C
  float mean_g_xhat;  // sum(g * xhat) / C
};

template <typename T>
static void reduce_row(const NormBwd& call, BackwardRow<T>& row) {
  F32 sum_g[kUnroll]{};
  F32 sum_centred[kUnroll]{};
  F32 sum_g_centred[kUnroll]{};
  for_each_vector(call.cols, [&](int64_t j, auto lanes, int u) __attribute__((always_inline)) {
    const F32 g = load(row.grad_out + j, lanes) * load(call.weight + j, lanes);
    const F32 centred = zero_beyond(load(row.s + j, lanes) - row.mean, lanes);
    sum_g[u] += g;
    sum_centred[u] += centred;
    sum_g_centred[u] = fma(g, centred, sum_g_centred[u]);
  });
  const float cols = static_cast<float>(call.cols);
  const bool centres = call.mean != nullptr;
  row.mean_g = centres ? reduce_add(sum_g) / cols : 0.0f;
  row.mean_rest = centres ? reduce_add(sum_centred) / cols : 0.0f;
  row.mean_g_xhat = (reduce_add(sum_g_centred) / cols - row.mean_rest * row.mean_g) * row.rstd;
}

// Gradients of kRows rows together, so that dweight and dbias are read and written once for all of them.
template <typename T, int kRows, bool kPastCaches>
static void write_gradients(const NormBwd& call, const BackwardRow<T>* rows, float* dweight, float* dbias) {
  for_each_vector(call.cols, [&](int64_t j, auto lanes, int) __attribute__((always_inline)) {
    const F32 weight = load(call.weight + j, lanes);
    F32 weight_share{};
    F32 bias_share{};
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const BackwardRow<T>& row = rows[r];
      const F32 grad_out = load(row.grad_out + j, lanes);
      const F32 xhat = (load(row.s + j, lanes) - row.mean - row.mean_rest) * row.rstd;
      // g is rounded here as it was in its mean, or a row of one column would keep the difference times rstd.
      const F32 g = grad_out * weight;
      F32 ds = fma(xhat, splat(-row.mean_g_xhat), g - row.mean_g) * row.rstd;
      if (row.grad_sum != nullptr) ds += load(row.grad_sum + j, lanes);
      store_output<kPastCaches>(row.ds + j, ds, lanes);
      if (row.dx != nullptr) {
        store_output<kPastCaches>(row.dx + j, drop(ds, row.decisions + j, call.dropout), lanes);
      }
      weight_share = fma(grad_out, xhat, weight_share);
      bias_share += grad_out;
    }
    if (dweight != nullptr) store(dweight + j, load(dweight + j, lanes) + weight_share, lanes);
    if (dbias != nullptr) store(dbias + j, load(dbias + j, lanes) + bias_share, lanes);
  });
}

template <typename T, bool kPastCaches>
static void norm_bwd_rows(const NormBwd& call, int64_t row_begin, int64_t row_end, float* dweight,
                          float* dbias) {
  constexpr int kRows = 4;
  const int64_t cols = call.cols;
  const Scratch scratch(kRows * decision_floats(cols));
  if (dweight != nullptr) __builtin_memset(dweight, 0, static_cast<size_t>(cols) * sizeof(float));
  if (dbias != nullptr) __builtin_memset(dbias, 0, static_cast<size_t>(cols) * sizeof(float));
  BackwardRow<T> rows[kRows];
  for (int64_t first = row_begin; first < row_end; first += kRows) {
    const int count = static_cast<int>(row_end - first < kRows ? row_end - first : kRows);
    for (int r = 0; r < count; ++r) {
      const int64_t row = first + r;
      uint16_t* const decisions = reinterpret_cast<uint16_t*>(scratch.data() + r * decision_floats(cols));
      if (call.dx != nullptr) draw_decisions(call.dropout, row, cols, decisions);
      const T* const grad_sum = static_cast<const T*>(call.grad_sum);
      rows[r] = {.grad_out = static_cast<const T*>(call.grad_out) + row * call.grad_out_row_stride,
                 .grad_sum = grad_sum != nullptr ? grad_sum + row * call.grad_sum_row_stride : nullptr,
                 .s = static_cast<const T*>(call.s) + row * call.s_row_stride,
                 .decisions = decisions,
                 .ds = static_cast<T*>(call.ds) + row * cols,
                 .dx = call.dx != nullptr ? static_cast<T*>(call.dx) + row * cols : nullptr,
                 .mean = call.mean != nullptr ? call.mean[row] : 0.0f,
                 .mean_rest = 0.0f,
                 .rstd = call.rstd[row],
                 .mean_g = 0.0f,
                 .mean_g_xhat = 0.0f};
      reduce_row(call, rows[r]);
    }
    if (count == kRows) {
      write_gradients<T, kRows, kPastCaches>(call, rows, dweight, dbias);
    } else {
      for (int r = 0; r < count; ++r) write_gradients<T, 1, kPastCaches>(call, rows + r, dweight, dbias);
    }
  }
  if constexpr (kPastCaches) stream_fence();
}

template <typename T>
static void norm_bwd_as(const NormBwd& call, int64_t row_begin, int64_t row_end, float* dweight,
                        float* dbias) {
  if (call.past_caches) {
    norm_bwd_rows<T, true>(call, row_begin, row_end, dweight, dbias);
  } else {
    norm_bwd_rows<T, false>(call, row_begin, row_end, dweight, dbias);
  }
}

static void norm_bwd(const NormBwd& call, int64_t row_begin, int64_t row_end, float* dweight, float* dbias) {
  if (call.dtype == DType::kFloat32) {
    norm_bwd_as<float>(call, row_begin, row_end, dweight, dbias);
  } else if (call.dtype == DType::kBFloat16) {
    norm_bwd_as<BFloat16>(call, row_begin, row_end, dweight, dbias);
  } else {
    norm_bwd_as<Float16>(call, row_begin, row_end, dweight, dbias);
  }
}

}  // namespace fastformer::cpu::FASTFORMER_ISA
