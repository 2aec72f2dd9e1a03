// One SIMD register of float32 and what kernels do with it, written once for every ISA level.
//
// The build compiles kernels.cpp once per level with -DFASTFORMER_ISA=avx512bf16|avx512|avx2|sse2|baseline
// and the matching -m flags. Everything lives in a namespace of that name, is static, and uses no STL
// template: otherwise the linker could merge an AVX-512 copy of a shared inline function into the baseline.
//
// Arithmetic is compiled with -ffp-contract=off: a * b + c rounds twice, fma(a, b, c) once (where the
// level has FMA).
#pragma once

#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if !defined(FASTFORMER_ISA)
#error "compile with -DFASTFORMER_ISA=avx512bf16|avx512|avx2|sse2|baseline"
#endif

#include "../shapes.h"
#include "sanitizers.h"

#define FASTFORMER_INLINE static inline __attribute__((always_inline))

namespace fastformer::cpu::FASTFORMER_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

FASTFORMER_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FASTFORMER_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

using F32 = float __attribute__((vector_size(4 * kLanes)));
using I32 = int32_t __attribute__((vector_size(4 * kLanes)));
using U32 = uint32_t __attribute__((vector_size(4 * kLanes)));
using U16 = uint16_t __attribute__((vector_size(2 * kLanes)));

// x - 0 folds to a broadcast; x + 0 would lose the sign of -0.
FASTFORMER_INLINE F32 splat(float x) { return x - F32{}; }
FASTFORMER_INLINE I32 splat(int32_t x) { return I32{} + x; }
FASTFORMER_INLINE U32 splat(uint32_t x) { return U32{} + x; }

// Lane l holds l.
FASTFORMER_INLINE I32 lane_index() {
  I32 lanes;
  for (int l = 0; l < kLanes; ++l) lanes[l] = l;
  return lanes;
}

#if defined(__AVX512F__)
// The 16-bit words of a register, numbered.
using Words = uint16_t __attribute__((vector_size(64)));
FASTFORMER_INLINE Words word_index() {
  Words words;
  for (uint16_t w = 0; w < 32; ++w) words[w] = w;
  return words;
}
#endif

// `mask` lanes are all ones or all zeros, as comparisons of vectors give them.
FASTFORMER_INLINE F32 select(I32 mask, F32 a, F32 b) { return mask ? a : b; }
FASTFORMER_INLINE I32 select(I32 mask, I32 a, I32 b) { return mask ? a : b; }
FASTFORMER_INLINE U32 select(I32 mask, U32 a, U32 b) { return mask ? a : b; }

// a * b + c, rounded once where the level has FMA and twice where it has not.
FASTFORMER_INLINE F32 fma(F32 a, F32 b, F32 c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// a where a > b, else b: b too where either is NaN.
FASTFORMER_INLINE F32 vmax(F32 a, F32 b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
  return _mm_max_ps(a, b);
#else
  return select(a > b, a, b);
#endif
}

// a where a < b, else b: b too where either is NaN.
FASTFORMER_INLINE F32 vmin(F32 a, F32 b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#elif defined(__SSE2__)
  return _mm_min_ps(a, b);
#else
  return select(a < b, a, b);
#endif
}

FASTFORMER_INLINE F32 sqrt(F32 x) {
#if defined(__AVX512F__)
  return _mm512_sqrt_ps(x);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(x);
#elif defined(__SSE2__)
  return _mm_sqrt_ps(x);
#else
  for (int l = 0; l < kLanes; ++l) x[l] = __builtin_sqrtf(x[l]);
  return x;
#endif
}

FASTFORMER_INLINE float sqrt(float x) { return __builtin_sqrtf(x); }

// Sum over lanes, in the fixed order of halving.
FASTFORMER_INLINE float reduce_add(F32 x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(x);
#elif defined(__AVX2__)
  __m128 h = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_shuffle_ps(h, h, 1)));
#else
  return (x[0] + x[2]) + (x[1] + x[3]);
#endif
}

// Largest lane; says nothing reliable where a lane is NaN.
FASTFORMER_INLINE float reduce_max(F32 x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(x);
#elif defined(__AVX2__)
  __m128 h = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  h = _mm_max_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_max_ss(h, _mm_shuffle_ps(h, h, 1)));
#else
  const float a = x[0] > x[2] ? x[0] : x[2];
  const float b = x[1] > x[3] ? x[1] : x[3];
  return a > b ? a : b;
#endif
}

// 2^x to about 1 ulp: a polynomial of degree 6 on [-1/2, 1/2] times a power of two. 0 at -inf, inf at
// inf, NaN at NaN; results below the normal range are denormal (zero under FlushDenormals).
FASTFORMER_INLINE F32 exp2(F32 x) {
#if defined(__AVX512F__)
  const F32 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  x = select(x < -151.0f, splat(-151.0f), select(x > 129.0f, splat(129.0f), x));  // keeps NaN
  // Adding 1.5 * 2^23 rounds to an integer, which the low mantissa bits then hold.
  const F32 shifted = x + 12582912.0f;
  const F32 n = shifted - 12582912.0f;
#endif
  const F32 f = x - n;
  F32 p = splat(1.5353362e-4f);  // minimax, with p(0) = 1: relative error 2e-9, with roundings 7.5e-8
  p = fma(p, f, splat(1.3398875e-3f));
  p = fma(p, f, splat(9.6184369e-3f));
  p = fma(p, f, splat(5.5503324e-2f));
  p = fma(p, f, splat(2.4022648e-1f));
  p = fma(p, f, splat(6.9314718e-1f));
  p = fma(p, f, splat(1.0f));
#if defined(__AVX512F__)
  // At x = -inf, f and p are NaN, and scalef(NaN, -inf) is defined as 0.
  return _mm512_scalef_ps(p, n);
#else
  // Two factors, because 2^-151 and 2^129 are no normal floats.
  const I32 exponent = (I32)shifted - 0x4B400000;
  const I32 half = exponent >> 1;
  return p * (F32)((half + 127) << 23) * (F32)((exponent - half + 127) << 23);
#endif
}

// 16-bit floats, both roundings nearest even

FASTFORMER_INLINE F32 widen_bfloat16(U16 bits) {
#if defined(__AVX512F__)
  // One permutation of words puts the bits into the high halves of lanes, and zeros into the low ones.
  return (F32)_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, (__m512i)(word_index() / 2),
                                             _mm512_castsi256_si512((__m256i)bits));
#else
  return (F32)(__builtin_convertvector(bits, U32) << 16);
#endif
}

FASTFORMER_INLINE U16 low_halves(U32 x) {
#if defined(__AVX512F__)
  return (U16)_mm512_cvtepi32_epi16((__m512i)x);
#elif defined(__AVX2__)
  const __m128i low = _mm256_castsi256_si128((__m256i)x), high = _mm256_extracti128_si256((__m256i)x, 1);
  return (U16)_mm_packus_epi32(low, high);  // every lane is below 2^16
#else
  return __builtin_convertvector(x, U16);
#endif
}

// NaN stays NaN.
FASTFORMER_INLINE U16 round_bfloat16(F32 x) {
#if defined(__AVX512F__)
  const __m512i bits = (__m512i)x;
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __mmask16 number = _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q);
  __m512i rounded = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF));
  rounded = _mm512_mask_add_epi32(rounded, odd, rounded, _mm512_set1_epi32(1));
  // The odd words, that is the high halves, side by side.
  const __m512i odd_words = (__m512i)(2 * word_index() + 1);
  return (U16)_mm512_castsi512_si256(
      _mm512_mask_permutexvar_epi16(_mm512_set1_epi16(0x7FC0), number, odd_words, rounded));
#else
  const U32 bits = (U32)x;
  const U32 rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return low_halves(select(x == x, rounded, (bits >> 16) | 0x40u));
#endif
}

FASTFORMER_INLINE F32 widen_float16(U16 half) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps((__m256i)half);
#elif defined(__AVX2__)
  return _mm256_cvtph_ps((__m128i)half);
#else
  const U32 bits = __builtin_convertvector(half, U32);
  const U32 sign = (bits & 0x8000u) << 16;
  const U32 magnitude = (bits & 0x7FFFu) << 13;
  const U32 exponent = magnitude & 0x0F800000u;
  const U32 normal = magnitude + (112u << 23);
  // A subnormal m * 2^-24 is the mantissa of 2^-14 + m * 2^-24: no float32 denormal, which DAZ would drop.
  const U32 subnormal = (U32)((F32)(magnitude | (113u << 23)) - 6.103515625e-05f);
  const U32 special = magnitude + (224u << 23);
  const U32 finite = select(exponent == 0u, subnormal, normal);
  return (F32)(select(exponent == 0x0F800000u, special, finite) | sign);
#endif
}

FASTFORMER_INLINE U16 round_float16(F32 x) {
#if defined(__AVX512F__)
  return (U16)_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (U16)_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
#else
  const U32 bits = (U32)x;
  const U32 sign = (bits >> 16) & 0x8000u;
  const U32 magnitude = bits & 0x7FFFFFFFu;
  const U32 normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 1/2 leaves the multiple of 2^-24 in the low mantissa bits, rounded by the addition itself.
  const U32 subnormal = (U32)((F32)magnitude + 0.5f) - 0x3F000000u;
  const U32 nan = ((magnitude >> 13) & 0x3FFu) | 0x7E00u;
  U32 half = select((I32)magnitude < 0x38800000, subnormal, normal);
  half = select((I32)magnitude >= 0x47800000, splat(0x7C00u), half);
  half = select(x == x, half, nan);
  return low_halves(half | sign);
#endif
}

FASTFORMER_INLINE F32 widen(U16 bits, BFloat16) { return widen_bfloat16(bits); }
FASTFORMER_INLINE F32 widen(U16 bits, Float16) { return widen_float16(bits); }
FASTFORMER_INLINE U16 narrow(F32 x, BFloat16) { return round_bfloat16(x); }
FASTFORMER_INLINE U16 narrow(F32 x, Float16) { return round_float16(x); }

// x as it comes back from memory of type T.
FASTFORMER_INLINE F32 rounded(F32 x, float) { return x; }
template <typename T>
FASTFORMER_INLINE F32 rounded(F32 x, T type) {
  return widen(narrow(x, type), type);
}

// memory: no alignment asked for

FASTFORMER_INLINE F32 load(const float* p) {
  F32 x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

template <typename T>
FASTFORMER_INLINE F32 load(const T* p) {
  U16 bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return widen(bits, T{});
}

FASTFORMER_INLINE void store(float* p, F32 x) { __builtin_memcpy(p, &x, sizeof x); }

template <typename T>
FASTFORMER_INLINE void store(T* p, F32 x) {
  const U16 bits = narrow(x, T{});
  __builtin_memcpy(p, &bits, sizeof bits);
}

#if defined(__AVX2__) && !defined(__AVX512F__)
FASTFORMER_INLINE __m256i first_lanes(int n) { return (__m256i)(lane_index() < n); }
#endif

// The first n lanes, 0 <= n <= kLanes, and zeros beyond; memory beyond them is not touched.
FASTFORMER_INLINE F32 load_n(const float* p, int n) {
  tell_reads(p, n);
#if defined(__AVX512F__)
  return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#elif defined(__AVX2__)
  return _mm256_maskload_ps(p, first_lanes(n));
#else
  F32 x{};
  for (int l = 0; l < kLanes; ++l) {
    if (l < n) x[l] = p[l];
  }
  return x;
#endif
}

template <typename T>
FASTFORMER_INLINE F32 load_n(const T* p, int n) {
  tell_reads(p, n);
#if defined(__AVX512F__)
  return widen((U16)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p), T{});
#else
  U16 bits{};
  for (int l = 0; l < kLanes; ++l) {
    if (l < n) bits[l] = p[l].bits;
  }
  return widen(bits, T{});
#endif
}

FASTFORMER_INLINE void store_n(float* p, F32 x, int n) {
  tell_writes(p, n);
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), x);
#elif defined(__AVX2__)
  _mm256_maskstore_ps(p, first_lanes(n), x);
#else
  for (int l = 0; l < kLanes; ++l) {
    if (l < n) p[l] = x[l];
  }
#endif
}

template <typename T>
FASTFORMER_INLINE void store_n(T* p, F32 x, int n) {
  tell_writes(p, n);
  const U16 bits = narrow(x, T{});
#if defined(__AVX512F__)
  _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)bits);
#else
  for (int l = 0; l < kLanes; ++l) {
    if (l < n) p[l].bits = bits[l];
  }
#endif
}

FASTFORMER_INLINE float to_float(float x) { return x; }

template <typename T>
FASTFORMER_INLINE float to_float(T x) {
  return widen(U16{} + x.bits, T{})[0];
}

template <typename T>
FASTFORMER_INLINE T from_float(float x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return x;
  } else {
    return T{narrow(splat(x), T{})[0]};
  }
}

// Stores that go past the caches, for output too large to be read soon. p must be aligned to the bytes
// stored (kLanes elements); stream_fence() orders them before the worker hands its rows over.
FASTFORMER_INLINE void stream(float* p, F32 x) {
  tell_writes(p, kLanes);
#if defined(__AVX512F__)
  _mm512_stream_ps(p, x);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, x);
#elif defined(__SSE2__)
  _mm_stream_ps(p, x);
#else
  store(p, x);
#endif
}

template <typename T>
FASTFORMER_INLINE void stream(T* p, F32 x) {
  tell_writes(p, kLanes);
#if defined(__AVX512F__)
  _mm256_stream_si256((__m256i*)p, (__m256i)narrow(x, T{}));
#elif defined(__AVX2__)
  _mm_stream_si128((__m128i*)p, (__m128i)narrow(x, T{}));
#else
  store(p, x);
#endif
}

FASTFORMER_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// fn(value of the type that dtype names)
template <typename Fn>
FASTFORMER_INLINE void with_type(DType dtype, Fn fn) {
  if (dtype == DType::kFloat32) {
    fn(float{});
  } else if (dtype == DType::kBFloat16) {
    fn(BFloat16{});
  } else {
    fn(Float16{});
  }
}

}  // namespace fastformer::cpu::FASTFORMER_ISA
