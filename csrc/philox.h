// The project's one random generator: Philox4x32 with seven rounds (Salmon et al., "Parallel random
// numbers: as easy as 1, 2, 3", SC 2011). Host and device.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTFORMER_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTFORMER_HOST_DEVICE inline
#endif

namespace fastformer {

struct PhiloxWords {
  uint32_t w[4];
};

// Counter words c0..c3, key = the 64-bit seed, low word first. Each result word holds two 16-bit
// decisions, the low half first.
FASTFORMER_HOST_DEVICE PhiloxWords philox4x32_7(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2,
                                                uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(seed);
  uint32_t k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 7; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace fastformer
