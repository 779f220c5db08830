// What this machine can do at best: fused multiply-adds and memory traffic, on a number of threads.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(__AVX512F__)
constexpr int BYTES = 64, CHAINS = 24;
#elif defined(__AVX__)
constexpr int BYTES = 32, CHAINS = 12;
#else
constexpr int BYTES = 16, CHAINS = 12;
#endif
typedef float Vec __attribute__((vector_size(BYTES)));

static double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

template <class Work>
static double time(int threads, Work work) {  // best of five
  double best = 1e30;
  for (int round = 0; round < 5; round++) {
    const double start = seconds();
    std::vector<std::thread> pool;
    for (int i = 1; i < threads; i++) pool.emplace_back(work, i);
    work(0);
    for (auto& thread : pool) thread.join();
    best = std::min(best, seconds() - start);
  }
  return best;
}

// Independent chains of fused multiply-adds that never leave the registers: operations per second.
extern "C" double multiply_add_rate(int threads) {
  constexpr int64_t STEPS = 10'000'000;
  const auto work = [](int) {
    Vec chain[CHAINS], factor, term;
    for (auto& c : chain) c = Vec{} + 1.0f;
    factor = Vec{} + 0.999f, term = Vec{} + 0.001f;
    for (int64_t i = 0; i < STEPS; i++) {
#pragma GCC unroll 24
      for (int j = 0; j < CHAINS; j++) chain[j] = chain[j] * factor + term;
    }
    volatile float sink = 0;
    for (auto& c : chain) sink = sink + c[0];
  };
  return 2.0 * threads * STEPS * CHAINS * (BYTES / 4) / time(threads, work);
}

// A copy from memory to memory, both already mapped: bytes read and written per second.
extern "C" double copy_rate(int threads) {
  constexpr int64_t SIZE = 256 << 20;
  std::vector<char> from(SIZE, 1), to(SIZE, 2);
  const auto work = [&](int i) { std::memcpy(&to[SIZE / threads * i], &from[SIZE / threads * i], SIZE / threads); };
  return 2.0 * (SIZE / threads * threads) / time(threads, work);
}

// The same into memory that the system hands out page by page; huge: in pages of 2 MB where it can.
extern "C" double fresh_copy_rate(int threads, int huge) {
  constexpr int64_t SIZE = 256 << 20;
  std::vector<char> from(SIZE, 1);
  double best = 0;
  for (int round = 0; round < 3; round++) {
    const std::unique_ptr<char[]> to(new char[SIZE]);
    const double start = seconds();
#if defined(__linux__)
    const auto begin = (reinterpret_cast<uintptr_t>(to.get()) + 4095) / 4096 * 4096;
    if (huge) madvise(reinterpret_cast<void*>(begin), SIZE - 4096, MADV_HUGEPAGE);
#endif
    std::vector<std::thread> pool;
    const auto work = [&](int i) { std::memcpy(&to[SIZE / threads * i], &from[SIZE / threads * i], SIZE / threads); };
    for (int i = 1; i < threads; i++) pool.emplace_back(work, i);
    work(0);
    for (auto& thread : pool) thread.join();
    best = std::max(best, 2.0 * (SIZE / threads * threads) / (seconds() - start));
  }
  return best;
}
