// CUDA's execution model on one CPU core: a .cu file compiles with plain g++ and runs, to be tested without a GPU.
//
// Every CUDA thread is a fiber with a stack of its own and runs until it meets a barrier or ends. A warp runs until all
// its lanes wait at a block's barrier, a block until all its warps have ended or wait at the grid's: each goes as far
// ahead of the others as the barriers let it, so a missing one shows. Divergence needs no special case. Blocks run one
// after the other, those of a cooperative launch together.
//
// Made to find bugs, not to be fast:
//  - shared memory is allocated per block at its exact size and filled with 0xff bytes, which is NaN in every floating
//    type; with -fsanitize=address an access outside it, or outside global memory, stops the program
//  - CUDA_ON_CPU_ORDER=ascending (the default), descending or a number (a seed) sets the order in which blocks, warps
//    and lanes run: a result that depends on it is a race
//  - a barrier that some thread never reaches, more shared memory than was asked for or exists, an oversized block or
//    grid, or more blocks in a cooperative launch than the device holds at once are errors, as on the device
//  - CUDA_ON_CPU_MULTIPROCESSORS (4) and CUDA_ON_CPU_SHARED, bytes of shared memory in each (227 KB), are the device's
//    size: small ones bring a kernel that fills the device to its limits
//
// Not modelled: races inside one instruction, memory ordering without barriers, streams (a launch returns when the
// kernel has ended), and rounding: a * b + c may or may not be fused.
//
// The folder holds stand-ins for the CUDA headers, so use: g++ -x c++ -I tests/cuda_on_cpu -I csrc kernel.cu.
// Kernels take their shared memory from csrc/cuda/kernel.h. Only that file and inline PTX know of CUDA_ON_CPU.
#pragma once

#define CUDA_ON_CPU 1

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)

struct uint3 {
  unsigned x, y, z;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct alignas(8) float2 {
  float x, y;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

using std::max;
using std::min;

namespace cuda_on_cpu {

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kFreeSharedBytes = 48 * 1024;  // without cudaFuncSetAttribute
constexpr int kThreadsOfMultiprocessor = 2048;

inline int setting(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : std::stoi(value);
}

inline int multiprocessors() { return setting("CUDA_ON_CPU_MULTIPROCESSORS", 4); }
inline int max_shared_bytes() { return setting("CUDA_ON_CPU_SHARED", 227 * 1024); }  // a block's limit on sm_90

enum class State { running, at_warp, at_block, at_grid, paused, ended };

struct Warp;
struct Block;

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  Block* block;
  Warp* warp;
  uint3 index;
  int lane;
  State state = State::running;
  unsigned mask = 0;  // of the warp operation it waits in
  void* fake_stack = nullptr;
};

struct Warp {
  std::vector<Thread*> lanes;          // in the order in which they run
  unsigned char values[warpSize][24];  // what the lanes show each other: at most an mma's operands
};

struct Block {
  uint3 index;
  std::unique_ptr<char[]> dynamic_shared;
  std::unordered_map<const void*, std::unique_ptr<char[]>> shared_arrays;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Warp*> order;  // in which the warps run
};

inline ucontext_t scheduler;
inline void* scheduler_fake_stack;
inline const void* scheduler_stack;
inline size_t scheduler_stack_bytes;
inline Thread* current;
inline const std::function<void()>* kernel_body;

// AddressSanitizer has to know which stack is in use.
inline void leave_stack([[maybe_unused]] void** fake_stack, [[maybe_unused]] const void* to,
                        [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake_stack, to, bytes);
#endif
}

inline void enter_stack([[maybe_unused]] void* fake_stack, [[maybe_unused]] const void** from,
                        [[maybe_unused]] size_t* bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, from, bytes);
#endif
}

inline void resume(Thread& thread) {
  current = &thread;
  threadIdx = thread.index;
  blockIdx = thread.block->index;
  leave_stack(&scheduler_fake_stack, thread.stack.get(), kStackBytes);
  swapcontext(&scheduler, &thread.context);
  enter_stack(scheduler_fake_stack, nullptr, nullptr);
}

inline uint64_t steps;  // of all threads, pauses excepted

inline void wait(State state) {
  Thread& self = *current;
  self.state = state;
  steps += state != State::paused;
  leave_stack(&self.fake_stack, scheduler_stack, scheduler_stack_bytes);
  swapcontext(&self.context, &scheduler);
  enter_stack(self.fake_stack, nullptr, nullptr);
}

inline void thread_main() {
  enter_stack(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  (*kernel_body)();
  current->state = State::ended;
  ++steps;
  leave_stack(nullptr, scheduler_stack, scheduler_stack_bytes);  // null: this stack is not needed again
  setcontext(&scheduler);
}

inline std::unique_ptr<char[]> poisoned(size_t bytes) {
  std::unique_ptr<char[]> memory(new char[bytes]);
  std::memset(memory.get(), 0xff, bytes);
  return memory;
}

// The block's array of a FASTARCH_SHARED declaration; every declaration has a Site type of its own.
template <typename T, typename Site>
T* shared_array(size_t count, Site) {
  static char key;
  std::unique_ptr<char[]>& array = current->block->shared_arrays[&key];
  if (!array) array = poisoned(count * sizeof(T));
  return reinterpret_cast<T*>(array.get());
}

inline void* dynamic_shared() { return current->block->dynamic_shared.get(); }

// A thread that waits for what another block writes lets everyone else run first.
inline void pause() { wait(State::paused); }

inline void sync_warp(unsigned mask) {
  current->mask = mask;
  wait(State::at_warp);
}

// What each lane of `mask` has given, once all have.
template <typename T>
std::array<T, warpSize> exchange(unsigned mask, T value) {
  Warp& warp = *current->warp;
  static_assert(sizeof(T) <= sizeof(warp.values[0]));
  std::memcpy(warp.values[current->lane], &value, sizeof(T));
  sync_warp(mask);
  std::array<T, warpSize> values;
  for (int lane = 0; lane < warpSize; ++lane) std::memcpy(&values[lane], warp.values[lane], sizeof(T));
  sync_warp(mask);  // before anyone gives the next
  return values;
}

template <typename T>
void put_in_order(std::vector<T>& items) {
  const char* name = std::getenv("CUDA_ON_CPU_ORDER");
  if (name == nullptr || std::string(name) == "ascending") return;
  if (std::string(name) == "descending") {
    std::reverse(items.begin(), items.end());
  } else {
    std::shuffle(items.begin(), items.end(), std::mt19937(std::stoul(name)));
  }
}

// Let go the lanes whose mates, those in their mask, all wait with them. Returns whether there was anyone.
inline bool open_warp_barrier(Warp& warp) {
  std::vector<Thread*> ready;
  for (Thread* thread : warp.lanes) {
    unsigned waiting = 0;
    for (const Thread* mate : warp.lanes) {
      if (mate->state == State::at_warp && mate->mask == thread->mask) waiting |= 1u << mate->lane;
    }
    if (thread->state == State::at_warp && (thread->mask & ~waiting) == 0) ready.push_back(thread);
  }
  for (Thread* thread : ready) thread->state = State::running;
  return !ready.empty();
}

// Whether every thread of the block that has not ended waits at `barrier`.
inline bool complete(const Block& block, State barrier) {
  return std::all_of(block.threads.begin(), block.threads.end(),
                     [&](const Thread& thread) { return thread.state == barrier || thread.state == State::ended; });
}

// Let go those who wait at `barrier`. Returns whether there was anyone.
inline bool open(Block& block, State barrier) {
  bool anyone = false;
  for (Thread& thread : block.threads) {
    if (thread.state != barrier) continue;
    thread.state = State::running;
    anyone = true;
  }
  return anyone;
}

inline void run_block(Block& block) {
  do {
    for (Warp* warp : block.order) {
      do {
        for (Thread* thread : warp->lanes) {
          if (thread->state == State::running) resume(*thread);
        }
      } while (open_warp_barrier(*warp));
    }
  } while (complete(block, State::at_block) && open(block, State::at_block));
}

// Run `blocks` until all their threads have ended.
inline void run_together(const std::vector<Block*>& blocks, bool cooperative) {
  const auto ended = [](const Block* block) { return complete(*block, State::ended); };
  const auto at_grid = [](const Block* block) { return complete(*block, State::at_grid); };
  for (;;) {
    const uint64_t before = steps;
    for (Block* block : blocks) run_block(*block);
    if (std::all_of(blocks.begin(), blocks.end(), ended)) return;
    bool anyone_paused = false;
    for (Block* block : blocks) anyone_paused |= open(*block, State::paused);
    if (anyone_paused && steps > before) continue;
    if (anyone_paused) throw std::runtime_error("cuda_on_cpu: deadlock, a thread waits for what nobody writes");
    const bool all_at_grid = std::all_of(blocks.begin(), blocks.end(), at_grid);
    if (all_at_grid && !cooperative) throw std::runtime_error("cuda_on_cpu: a grid barrier wants a cooperative launch");
    if (!all_at_grid) throw std::runtime_error("cuda_on_cpu: deadlock, a barrier that some thread never reaches");
    for (Block* block : blocks) open(*block, State::at_grid);
  }
}

inline Block make_block(dim3 size) {
  const unsigned threads = size.x * size.y * size.z;
  Block block;
  block.threads = std::vector<Thread>(threads);
  block.warps.resize((threads + warpSize - 1) / warpSize);
  for (unsigned i = 0; i < threads; ++i) {
    Thread& thread = block.threads[i];
    thread.warp = &block.warps[i / warpSize];
    thread.warp->lanes.push_back(&thread);
    thread.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    thread.lane = i % warpSize;
  }
  for (Warp& warp : block.warps) {
    put_in_order(warp.lanes);
    block.order.push_back(&warp);
  }
  put_in_order(block.order);
  return block;
}

inline void begin(Block& block, uint3 index, size_t shared_bytes) {
  block.index = index;
  block.dynamic_shared = poisoned(shared_bytes);
  block.shared_arrays.clear();
  for (Thread& thread : block.threads) {
    thread.block = &block;
    thread.state = State::running;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStackBytes;
    makecontext(&thread.context, thread_main, 0);
  }
}

inline void run(dim3 grid, dim3 block_size, size_t shared_bytes, bool cooperative, const std::function<void()>& body) {
  blockDim = block_size;
  gridDim = grid;
  kernel_body = &body;
  std::vector<uint3> indices;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) indices.push_back({x, y, z});
    }
  }
  put_in_order(indices);

  std::vector<Block> blocks;  // all of them, or one that serves every index in turn
  for (size_t i = 0; i < (cooperative ? indices.size() : 1); ++i) blocks.push_back(make_block(block_size));
  std::vector<Block*> together;
  for (const uint3& index : indices) {
    Block& block = blocks[together.size()];
    begin(block, index, shared_bytes);
    together.push_back(&block);
    if (cooperative && together.size() < indices.size()) continue;
    run_together(together, cooperative);
    together.clear();
  }
}

inline std::unordered_map<const void*, size_t> shared_limits;  // by kernel, from cudaFuncSetAttribute

}  // namespace cuda_on_cpu

// What kernels call.

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::State::at_block); }
inline void __syncwarp(unsigned mask = ~0u) { cuda_on_cpu::sync_warp(mask); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

inline unsigned __ballot_sync(unsigned mask, bool vote) {
  const std::array<bool, warpSize> votes = cuda_on_cpu::exchange(mask, vote);
  unsigned bits = 0;
  for (int lane = 0; lane < warpSize; ++lane) bits |= (mask >> lane & 1 && votes[lane]) ? 1u << lane : 0u;
  return bits;
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return cuda_on_cpu::exchange(mask, value)[lane & (warpSize - 1)];
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return cuda_on_cpu::exchange(mask, value)[(cuda_on_cpu::current->lane ^ bits) & (warpSize - 1)];
}

inline float __fdividef(float a, float b) { return a / b; }  // on the device less exact

// Loads and stores with a hint to the caches.
template <typename T>
T __ldcs(const T* from) {
  return *from;
}
template <typename T>
T __ldcg(const T* from) {
  return *from;
}
template <typename T>
void __stcs(T* to, T value) {
  *to = value;
}

namespace cuda_on_cpu {

// The elements of a 32-bit word of the storage type, as tensor cores read it: of TF32 they cut off what is too long.
template <typename T>
std::array<float, 2> elements(unsigned word);

// sum += A B of the tensor cores, for 16 x 8 words of A and 8 words x 8 columns of B: mma.sync's m16n8k8 of TF32, and
// its m16n8k16 of 16 bits, whose words hold two elements.
template <typename T>
void mma(float (&sum)[4], const uint4& a, unsigned b0, unsigned b1) {
  struct Fragments {
    unsigned a[4], b[2];  // a: rows g and g + 8 of word q, then of word q + 4; b: words q and q + 4 of column g
  };
  const auto lanes = exchange(~0u, Fragments{{a.x, a.y, a.z, a.w}, {b0, b1}});
  const int g = current->lane / 4, q = current->lane % 4;
  for (int i = 0; i < 4; ++i) {
    for (int word = 0; word < 8; ++word) {  // row g or g + 8, column 2q or 2q + 1
      const auto left = elements<T>(lanes[g * 4 + word % 4].a[word / 4 * 2 + i / 2]);
      const auto right = elements<T>(lanes[(2 * q + i % 2) * 4 + word % 4].b[word / 4]);
      for (int e = 0; e < 2; ++e) sum[i] += left[e] * right[e];
    }
  }
}

}  // namespace cuda_on_cpu

namespace cooperative_groups {

struct grid_group {
  void sync() const { cuda_on_cpu::wait(cuda_on_cpu::State::at_grid); }
};

inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups

// Storage types.

struct __half {
  _Float16 value;
};

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __half2float(__half h) { return h.value; }
inline __half __float2half_rn(float f) { return {static_cast<_Float16>(f)}; }

inline float __bfloat162float(__nv_bfloat16 b) {
  const uint32_t bits = uint32_t{b.bits} << 16;
  float f;
  std::memcpy(&f, &bits, sizeof(f));
  return f;
}

inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof(f));
  if (f != f) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // to nearest, ties to even
}

namespace cuda_on_cpu {

template <>
inline std::array<float, 2> elements<float>(unsigned word) {
  word &= ~0x1fffu;
  float value;
  std::memcpy(&value, &word, sizeof(value));
  return {value, 0.0f};
}
template <>
inline std::array<float, 2> elements<__half>(unsigned word) {
  std::array<__half, 2> halves;
  std::memcpy(&halves, &word, sizeof(word));
  return {__half2float(halves[0]), __half2float(halves[1])};
}
template <>
inline std::array<float, 2> elements<__nv_bfloat16>(unsigned word) {
  std::array<__nv_bfloat16, 2> halves;
  std::memcpy(&halves, &word, sizeof(word));
  return {__bfloat162float(halves[0]), __bfloat162float(halves[1])};
}

}  // namespace cuda_on_cpu

// What the host calls.

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorCooperativeLaunchTooLarge = 720
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrL2CacheSize };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative };

using cudaStream_t = struct CUstream_st*;

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = cuda_on_cpu::multiprocessors();
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = cuda_on_cpu::max_shared_bytes();
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = 50 * 1024 * 1024;
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

template <typename... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...), cudaFuncAttribute, int bytes) {
  if (bytes < 0 || bytes > cuda_on_cpu::max_shared_bytes()) return cudaErrorInvalidValue;
  cuda_on_cpu::shared_limits[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}

// As many as threads and shared memory allow.
template <typename... Params>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(Params...), int threads, size_t bytes) {
  const size_t shared = cuda_on_cpu::max_shared_bytes();
  *blocks = bytes > shared ? 0 : cuda_on_cpu::kThreadsOfMultiprocessor / threads;
  if (bytes > 0) *blocks = std::min<size_t>(*blocks, shared / bytes);
  return cudaSuccess;
}

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  const auto limit = cuda_on_cpu::shared_limits.find(reinterpret_cast<const void*>(kernel));
  const bool raised = limit != cuda_on_cpu::shared_limits.end();
  const dim3 grid = config->gridDim, block = config->blockDim;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (config->dynamicSmemBytes > (raised ? limit->second : cuda_on_cpu::kFreeSharedBytes)) return cudaErrorInvalidValue;
  if (threads < 1 || threads > 1024 || grid.x < 1 || grid.x > 0x7fffffff || grid.y < 1 || grid.y > 65535 ||
      grid.z < 1 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  bool cooperative = false;
  for (unsigned i = 0; i < config->numAttrs; ++i) cooperative |= config->attrs[i].val.cooperative != 0;
  if (cooperative) {
    int blocks = 0;
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, static_cast<int>(threads), config->dynamicSmemBytes);
    if (uint64_t{grid.x} * grid.y * grid.z > uint64_t(blocks) * cuda_on_cpu::multiprocessors())
      return cudaErrorCooperativeLaunchTooLarge;
  }
  cuda_on_cpu::run(grid, block, config->dynamicSmemBytes, cooperative, [&] { kernel(args...); });
  return cudaSuccess;
}
