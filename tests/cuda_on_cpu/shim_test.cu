// Small kernels, sound and with planted bugs, that prove tests/cuda_on_cpu itself. argv[1] names the case; exit status
// 0 means that every result was right.
#include <cooperative_groups.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cuda/kernel.h"

namespace fastarch {
namespace {

enum class Barrier { none, warp, block };

// y[i] = x[n - 1 - i], through shared memory: right only with the block's barrier.
template <Barrier BARRIER>
__global__ void reverse_kernel(const float* x, float* y, int extra) {
  float* tile = dynamic_shared<float>();
  const int i = threadIdx.x, n = blockDim.x;
  tile[i + extra] = x[i];
  if (BARRIER == Barrier::warp) __syncwarp();
  if (BARRIER == Barrier::block) __syncthreads();
  y[i] = tile[n - 1 - i];
}

// The same in an array of fixed size, of which it reads one element that nobody wrote.
__global__ void reverse_fixed_kernel(const float* x, float* y, int extra) {
  FASTARCH_SHARED(float, tile, 64);
  const int i = threadIdx.x, n = blockDim.x;
  if (i > 0 || extra == 0) tile[i] = x[i];
  __syncthreads();
  y[i] = tile[n - 1 - i];
}

// Every lane's sum over its warp, its rank among the odd values, and lane 3's value.
__global__ void warp_kernel(const float* x, float* sum, float* rank, float* third) {
  const int i = threadIdx.x;
  const float value = x[i];
  float total = value;
  for (int bits = 16; bits > 0; bits /= 2) total += __shfl_xor_sync(~0u, total, bits);
  const unsigned odd = __ballot_sync(~0u, static_cast<int>(value) % 2 != 0);
  sum[i] = total;
  rank[i] = __popc(odd & ((1u << i % 32) - 1));
  third[i] = __shfl_sync(~0u, value, 3);
}

// Each thread adds its neighbours' values of the step before: wrong unless the whole grid waits between the steps.
__global__ void diffuse_kernel(float* even, float* odd, int steps) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x, n = gridDim.x * blockDim.x;
  for (int step = 0; step < steps; ++step) {
    const float* from = step % 2 ? odd : even;
    float* to = step % 2 ? even : odd;
    to[i] = from[(i + n - 1) % n] + from[(i + 1) % n];
    cooperative_groups::this_grid().sync();
  }
}

// Half of the threads never reach the barrier that the other half waits at, and wait at another one.
__global__ void deadlock_kernel() {
  if (threadIdx.x % 2) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

std::vector<float> numbers(int n) {
  std::vector<float> x(n);
  for (int i = 0; i < n; ++i) x[i] = static_cast<float>(i * 7 % 31);
  return x;
}

bool run(const char* name) {
  const auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
  const int n = 64;
  const std::vector<float> x = numbers(n);
  std::vector<float> y(n), want(x.rbegin(), x.rend());
  const size_t bytes = n * sizeof(float);

  if (is("reverse")) {
    return launch(reverse_kernel<Barrier::block>, 3, n, bytes, false, nullptr, x.data(), y.data(), 0) == cudaSuccess &&
           y == want;
  }
  if (is("no barrier")) {
    return launch(reverse_kernel<Barrier::none>, 3, n, bytes, false, nullptr, x.data(), y.data(), 0) == cudaSuccess &&
           y == want;
  }
  if (is("warp barrier")) {
    return launch(reverse_kernel<Barrier::warp>, 3, n, bytes, false, nullptr, x.data(), y.data(), 0) == cudaSuccess &&
           y == want;
  }
  if (is("shared overflow")) {
    launch(reverse_kernel<Barrier::block>, 1, n, bytes, false, nullptr, x.data(), y.data(), 1);
    return true;
  }
  if (is("global overflow")) {
    launch(reverse_kernel<Barrier::block>, 1, n, bytes, false, nullptr, x.data(), y.data() + 1, 0);
    return true;
  }
  if (is("fixed")) {
    return launch(reverse_fixed_kernel, 1, n, 0, false, nullptr, x.data(), y.data(), 0) == cudaSuccess && y == want;
  }
  if (is("fixed overflow")) {
    std::vector<float> longer = numbers(2 * n), out(2 * n);
    launch(reverse_fixed_kernel, 1, n + 1, 0, false, nullptr, longer.data(), out.data(), 0);
    return true;
  }
  if (is("unwritten")) {  // the first block's leftovers must not hide it either
    launch(reverse_fixed_kernel, 1, n, 0, false, nullptr, x.data(), y.data(), 0);
    launch(reverse_fixed_kernel, 1, n, 0, false, nullptr, x.data(), y.data(), 1);
    return std::isnan(y[n - 1]);
  }
  if (is("warp")) {
    std::vector<float> sum(n), rank(n), third(n);
    if (launch(warp_kernel, 1, n, 0, false, nullptr, x.data(), sum.data(), rank.data(), third.data()) != cudaSuccess)
      return false;
    for (int i = 0; i < n; ++i) {
      float total = 0, odd = 0;
      for (int j = i / 32 * 32; j < i / 32 * 32 + 32; ++j) {
        total += x[j];
        odd += j < i && static_cast<int>(x[j]) % 2;
      }
      if (sum[i] != total || rank[i] != odd || third[i] != x[i / 32 * 32 + 3]) return false;
    }
    return true;
  }
  if (is("grid barrier") || is("no cooperation")) {
    std::vector<float> even = x, odd(n), a = x, b(n);
    const int steps = 5;
    for (int step = 0; step < steps; ++step, std::swap(a, b)) {
      for (int i = 0; i < n; ++i) b[i] = a[(i + n - 1) % n] + a[(i + 1) % n];
    }
    launch(diffuse_kernel, 4, n / 4, 0, is("grid barrier"), nullptr, even.data(), odd.data(), steps);
    return odd == a;
  }
  if (is("deadlock")) {
    launch(deadlock_kernel, 1, n, 0, false, nullptr);
    return true;
  }
  if (is("limits")) {  // each of these the device refuses too
    return launch(reverse_kernel<Barrier::block>, 1, n, 228 * 1024, false, nullptr, x.data(), y.data(), 0) !=
               cudaSuccess &&
           launch(reverse_kernel<Barrier::block>, 1LL << 31, n, bytes, false, nullptr, x.data(), y.data(), 0) !=
               cudaSuccess &&
           launch(reverse_kernel<Barrier::block>, 1, 1025, 5000, false, nullptr, x.data(), y.data(), 0) !=
               cudaSuccess &&
           launch(diffuse_kernel, 4 * 2048 / n + 1, n, 0, true, nullptr, y.data(), y.data(), 1) != cudaSuccess;
  }
  return false;
}

}  // namespace
}  // namespace fastarch

int main(int, char** argv) { return fastarch::run(argv[1]) ? 0 : 1; }
