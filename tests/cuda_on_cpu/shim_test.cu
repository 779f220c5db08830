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

// The first block's sum of what each block writes: wrong unless it waits for them, in a loop.
__global__ void gather_kernel(unsigned* come, unsigned expected, float* values, float* sum) {
  if (threadIdx.x == 0) {
    values[blockIdx.x] = blockIdx.x + 1.0f;
    ++*come;
  }
  if (blockIdx.x > 0) return;
  if (threadIdx.x == 0) {
    while (*come < expected) cuda_on_cpu::pause();
  }
  __syncthreads();
  sum[threadIdx.x] = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum[threadIdx.x] += values[i];
}

// sum [16, 8] of a [16, 8] and b [8, 8], which are words of one or two elements T. Lanes hold rows, columns and
// words as PTX's tables of mma.m16n8k8 and m16n8k16 say.
template <typename T>
__global__ void mma_kernel(const unsigned* a, const unsigned* b, float* sum) {
  const int g = threadIdx.x / 4, q = threadIdx.x % 4;
  const uint4 left = {a[g * 8 + q], a[(g + 8) * 8 + q], a[g * 8 + q + 4], a[(g + 8) * 8 + q + 4]};
  float c[4] = {};
  cuda_on_cpu::mma<T>(c, left, b[q * 8 + g], b[(q + 4) * 8 + g]);
  for (int i = 0; i < 4; ++i) sum[(g + i / 2 * 8) * 8 + 2 * q + i % 2] = c[i];
}

// Small integers, of which products and sums are exact in every type.
template <typename T>
bool multiplies() {
  constexpr int kPerWord = 4 / sizeof(T);
  constexpr int K = 8 * kPerWord;
  std::vector<unsigned> a(16 * 8), b(8 * 8);
  std::vector<float> x(16 * K), y(K * 8), sum(16 * 8);
  const auto put = [](std::vector<unsigned>& words, int word, int element, float value) {
    const T narrowed = narrow<T>(value);
    std::memcpy(reinterpret_cast<char*>(&words[word]) + element * sizeof(T), &narrowed, sizeof(T));
  };
  for (int k = 0; k < K; ++k) {
    for (int i = 0; i < 16; ++i) put(a, i * 8 + k / kPerWord, k % kPerWord, x[i * K + k] = (i * 5 + k * 3) % 11 - 4);
    for (int j = 0; j < 8; ++j) put(b, k / kPerWord * 8 + j, k % kPerWord, y[k * 8 + j] = (k * 7 + j * 2) % 13 - 6);
  }
  if (launch(mma_kernel<T>, 1, kWarp, 0, false, nullptr, a.data(), b.data(), sum.data()) != cudaSuccess) return false;
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      float want = 0;
      for (int k = 0; k < K; ++k) want += x[i * K + k] * y[k * 8 + j];
      if (sum[i * 8 + j] != want) return false;
    }
  }
  return true;
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
  if (is("waiting loop") || is("endless loop")) {
    const unsigned blocks = 4;
    unsigned come = 0;
    std::vector<float> values(blocks), sum(n);
    launch(gather_kernel, blocks, n, 0, true, nullptr, &come, is("endless loop") ? blocks + 1 : blocks, values.data(),
           sum.data());
    return sum == std::vector<float>(n, 10.0f);
  }
  if (is("mma")) return multiplies<float>() && multiplies<__half>() && multiplies<__nv_bfloat16>();
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
