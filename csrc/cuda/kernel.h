// What the CUDA kernels of all operations share: storage types and their arithmetic, tensors, shared memory, launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>

#include "cuda/tensor.h"

// FASTARCH_SHARED declares an array in the block's shared memory; dynamic_shared is the part whose size the launch
// decides. Plain C++ has no words for them, so tests/cuda_on_cpu brings its own.
#if defined(CUDA_ON_CPU)
#define FASTARCH_SHARED(type, name, count) type* const name = cuda_on_cpu::shared_array<type>(count, [] {})
#else
#define FASTARCH_SHARED(type, name, count) __shared__ type name[count]
#endif

namespace fastarch {

constexpr int kWarp = 32;

template <typename A, typename B>
__host__ __device__ constexpr auto div_up(A a, B b) {
  return (a + b - 1) / b;
}
template <typename A, typename B>
__host__ __device__ constexpr auto round_up(A a, B b) {
  return div_up(a, b) * b;
}

template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
#if defined(CUDA_ON_CPU)
  return static_cast<T*>(cuda_on_cpu::dynamic_shared());
#else
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
#endif
}

// What a tensor of T is computed in: float32, or its own precision if that is more.
template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <typename T>
using accumulator = typename Accumulator<T>::type;

__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

// To the nearest, ties to even.
template <typename T>
__device__ __forceinline__ T narrow(accumulator<T> value) {
  return value;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

template <typename T>
__device__ __forceinline__ T& at(const Tensor4& tensor, int64_t i, int64_t j, int64_t k, int64_t l) {
  const int64_t* stride = tensor.stride;
  return static_cast<T*>(tensor.data)[i * stride[0] + j * stride[1] + k * stride[2] + l * stride[3]];
}

template <typename T>
__device__ __forceinline__ const T& at(const ConstTensor4& tensor, int64_t i, int64_t j, int64_t k, int64_t l) {
  const int64_t* stride = tensor.stride;
  return static_cast<const T*>(tensor.data)[i * stride[0] + j * stride[1] + k * stride[2] + l * stride[3]];
}

// Start `kernel` and report whether that worked; without blocks there is nothing to do. `cooperative`: its blocks wait
// for each other (a grid barrier), so all of them must fit on the device at once.
template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), int64_t blocks, int threads, size_t shared_bytes, bool cooperative,
                   cudaStream_t stream, Args&&... args) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > std::numeric_limits<int>::max()) return cudaErrorInvalidConfiguration;
  if (shared_bytes > 48 * 1024) {  // more has to be asked for
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = cooperative;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

}  // namespace fastarch
