// What a kernel of more than 48 KB of shared memory needs before its first launch on a device.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

namespace fastformer::cuda {

constexpr int kDevices = 64;
// Of one kernel: on which devices it has its shared memory.
using Allowed = std::atomic<bool>[kDevices];

// Lets a kernel have `bytes` of dynamic shared memory on the current device: once, since the driver
// remembers.
template <typename Params>
cudaError_t allow_shared(void (*kernel)(Params), int bytes, Allowed& allowed) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const auto set = [&] {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  };
  if (device >= kDevices) return set();
  if (allowed[device].load(std::memory_order_acquire)) return cudaSuccess;
  const cudaError_t failed = set();
  if (failed == cudaSuccess) allowed[device].store(true, std::memory_order_release);
  return failed;
}

}  // namespace fastformer::cuda
