// The generator of philox.h on kLanes counters at once.
#pragma once

#include "vec.h"

namespace fastformer::cpu::FASTFORMER_ISA {

struct PhiloxVectors {
  U32 w[4];  // lane l of w[i] is word i of lane l's counter
};

// The low and the high words of every lane's 64-bit product with a constant. Hardware multiplies even lanes
// only, so the odd ones are moved there, and the two sets of products are merged.
FASTFORMER_INLINE void multiply_wide(U32 a, uint32_t constant, U32& low, U32& high) {
#if defined(__AVX512F__)
  const __m512i factor = _mm512_set1_epi32(static_cast<int>(constant));
  const __m512i even = _mm512_mul_epu32((__m512i)a, factor);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), factor);
  low = (U32)_mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CCAA);
  high = (U32)_mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB);
#elif defined(__AVX2__)
  const __m256i factor = _mm256_set1_epi32(static_cast<int>(constant));
  const __m256i even = _mm256_mul_epu32((__m256i)a, factor);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), factor);
  low = (U32)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  high = (U32)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
#elif defined(__SSE2__)
  const __m128i factor = _mm_set1_epi32(static_cast<int>(constant));
  const __m128i even = _mm_mul_epu32((__m128i)a, factor);
  const __m128i odd = _mm_mul_epu32(_mm_srli_epi64((__m128i)a, 32), factor);
  const __m128i low_words = _mm_set_epi32(0, -1, 0, -1);
  low = (U32)_mm_or_si128(_mm_and_si128(low_words, even), _mm_slli_epi64(odd, 32));
  high = (U32)_mm_or_si128(_mm_srli_epi64(even, 32), _mm_andnot_si128(low_words, odd));
#else
  for (int l = 0; l < kLanes; ++l) {
    const uint64_t product = static_cast<uint64_t>(a[l]) * constant;
    low[l] = static_cast<uint32_t>(product);
    high[l] = static_cast<uint32_t>(product >> 32);
  }
#endif
}

FASTFORMER_INLINE PhiloxVectors philox4x32_7(uint64_t seed, U32 c0, U32 c1, U32 c2, U32 c3) {
  uint32_t k0 = static_cast<uint32_t>(seed);
  uint32_t k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 7
  for (int round = 0; round < 7; ++round) {
    U32 low0, high0, low1, high1;
    multiply_wide(c0, 0xD2511F53u, low0, high0);
    multiply_wide(c2, 0xCD9E8D57u, low1, high1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Writes the words of kLanes counters to memory, each counter's four words side by side. The counters come in
// the order of interleaved_index(), not of the lanes.
FASTFORMER_INLINE void store_interleaved(uint32_t* p, const PhiloxVectors& words) {
#if defined(__AVX512F__)
  const __m512i w0 = (__m512i)words.w[0], w1 = (__m512i)words.w[1];
  const __m512i w2 = (__m512i)words.w[2], w3 = (__m512i)words.w[3];
  const __m512i low01 = _mm512_unpacklo_epi32(w0, w1), high01 = _mm512_unpackhi_epi32(w0, w1);
  const __m512i low23 = _mm512_unpacklo_epi32(w2, w3), high23 = _mm512_unpackhi_epi32(w2, w3);
  _mm512_storeu_si512(p, _mm512_unpacklo_epi64(low01, low23));
  _mm512_storeu_si512(p + kLanes, _mm512_unpackhi_epi64(low01, low23));
  _mm512_storeu_si512(p + 2 * kLanes, _mm512_unpacklo_epi64(high01, high23));
  _mm512_storeu_si512(p + 3 * kLanes, _mm512_unpackhi_epi64(high01, high23));
#elif defined(__AVX2__)
  const __m256i w0 = (__m256i)words.w[0], w1 = (__m256i)words.w[1];
  const __m256i w2 = (__m256i)words.w[2], w3 = (__m256i)words.w[3];
  const __m256i low01 = _mm256_unpacklo_epi32(w0, w1), high01 = _mm256_unpackhi_epi32(w0, w1);
  const __m256i low23 = _mm256_unpacklo_epi32(w2, w3), high23 = _mm256_unpackhi_epi32(w2, w3);
  _mm256_storeu_si256((__m256i*)p, _mm256_unpacklo_epi64(low01, low23));
  _mm256_storeu_si256((__m256i*)(p + kLanes), _mm256_unpackhi_epi64(low01, low23));
  _mm256_storeu_si256((__m256i*)(p + 2 * kLanes), _mm256_unpacklo_epi64(high01, high23));
  _mm256_storeu_si256((__m256i*)(p + 3 * kLanes), _mm256_unpackhi_epi64(high01, high23));
#else
  for (int l = 0; l < kLanes; ++l) {
    for (int i = 0; i < 4; ++i) p[4 * l + i] = words.w[i][l];
  }
#endif
}

// Where in memory store_interleaved() puts the counter of each lane: a 4x4 transpose within every 128 bits
// leaves lane 4 j + i in the i-th register, j-th quarter.
FASTFORMER_INLINE U32 interleaved_index() {
  U32 index;
  for (uint32_t l = 0; l < kLanes; ++l) index[l] = l % 4 * (kLanes / 4) + l / 4;
  return index;
}

// `keep` of consecutive columns whose 16-bit decisions lie in column order.
FASTFORMER_INLINE I32 kept(const uint16_t* decisions, uint32_t threshold) {
  U16 halves;
  __builtin_memcpy(&halves, decisions, sizeof halves);
  return (I32) __builtin_convertvector(halves, U32) >= static_cast<int32_t>(threshold);
}

}  // namespace fastformer::cpu::FASTFORMER_ISA
