// What the machine multiplies and adds at best: chains of fma on registers alone, for benchmarks to measure
// kernels against.
#pragma once

#include "vec.h"

namespace fastformer::cpu::FASTFORMER_ISA {

// More chains than any core has multiply-adds under way (two ports, five cycles each), and few enough that a
// level with sixteen registers holds them all.
constexpr int kChains = 12;

// Runs `rounds` of one multiply-add in every lane of every chain, and returns how many operations that were.
// `sum` receives what they came to, so that no compiler leaves them out.
static double run_fma(int64_t rounds, float& sum) {
  F32 chain[kChains];
  for (int c = 0; c < kChains; ++c) chain[c] = splat(static_cast<float>(c));
  const F32 factor = splat(0.5f), term = splat(1.0f);  // towards 2: never denormal, never infinite
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) chain[c] = fma(chain[c], factor, term);
  }
  F32 total{};
  for (int c = 0; c < kChains; ++c) total += chain[c];
  sum = reduce_add(total);
  return 2.0 * kLanes * kChains * static_cast<double>(rounds);
}

}  // namespace fastformer::cpu::FASTFORMER_ISA
