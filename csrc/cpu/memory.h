// Memory for outputs and scratch.
#pragma once

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/MemoryFormat.h>
#include <c10/util/strides.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <memory>
#include <mutex>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastarch {

// Where uninitialised memory has to be poisoned, it must be torch's own, and nothing may be left in it.
inline bool poisons_memory() {
  return at::globalContext().deterministicAlgorithms() && at::globalContext().deterministicFillUninitializedMemory();
}

// Blocks that were given back, the oldest first, for the next one that asks for as many bytes: a page that is still
// there need not be cleared again. As malloc does, it keeps blocks of up to 32 MB, and four of those in all. A lock
// that is taken is no reason to wait: after a fork its owner may not exist.
class KeptBlocks {
 public:
  struct Block {
    void* memory;
    size_t bytes;
  };

  // Blocks from LARGE on are whole huge pages, of which the last one wastes a third of a block at most. Smaller ones
  // malloc keeps as well, but only until much is free at the end of its heap: a training step of a GRU of one time step
  // (64 rows, 512 units) met 250 to 330 page faults and took 4.2 to 4.6 ms; from kept blocks none, 3.9 to 4.2 ms.
  static constexpr size_t HUGE_PAGE = 2 << 20, LARGE = 2 * HUGE_PAGE, UNIT = 64 << 10, SMALLEST = 4 * UNIT;

  static KeptBlocks& all() {
    static auto* const kept = new KeptBlocks;  // never destroyed: tensors may outlive whatever has an order
    return *kept;
  }

  void* take(size_t bytes) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    const auto found = std::find_if(blocks_.rbegin(), blocks_.rend(), [&](Block b) { return b.bytes == bytes; });
    if (found == blocks_.rend()) return nullptr;
    void* const memory = found->memory;
    blocks_.erase(std::next(found).base());
    total_ -= bytes;
    return memory;
  }

  void give_back(Block block) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock || block.bytes > LARGEST) return std::free(block.memory);
    blocks_.push_back(block);
    total_ += block.bytes;
    free_down_to(MOST);
  }

  // For what could not be allocated beside them.
  void give_up() {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (lock) free_down_to(0);
  }

 private:
  static constexpr size_t LARGEST = 32 << 20, MOST = 4 * LARGEST;

  KeptBlocks() { blocks_.reserve(MOST / SMALLEST + 1); }  // giving back must not need memory: it would terminate

  void free_down_to(size_t bytes) {
    for (; total_ > bytes; blocks_.erase(blocks_.begin())) {
      total_ -= blocks_.front().bytes;
      std::free(blocks_.front().memory);
    }
  }

  std::mutex mutex_;
  std::vector<Block> blocks_;
  size_t total_ = 0;
};

// An uninitialised tensor; a large one on huge pages, because page faults are most of the cost of fresh memory: a copy
// of 205 MB took 24 ms into warm memory, 114 into fresh, 40 into fresh on huge pages. It begins on such a page, or its
// ends fault in small ones: of 26 MB 850 times, which took 6.3 ms where computing took 2.3.
inline at::Tensor fresh(at::IntArrayRef sizes, at::IntArrayRef strides, const at::TensorOptions& options) {
#if defined(__linux__)
  const size_t bytes = c10::multiply_integers(sizes) * options.dtype().itemsize();
  const bool large = bytes > KeptBlocks::LARGE - KeptBlocks::UNIT;  // smaller blocks stay smaller in whole units
  const size_t unit = large ? KeptBlocks::HUGE_PAGE : KeptBlocks::UNIT, whole = (bytes + unit - 1) / unit * unit;
  if (bytes >= KeptBlocks::SMALLEST && !poisons_memory() && c10::GetCPUAllocator() == c10::GetDefaultCPUAllocator()) {
    at::Tensor t = at::empty({0}, options);  // whatever can throw comes before the memory that would be lost
    std::unique_ptr<KeptBlocks::Block> block(new KeptBlocks::Block{KeptBlocks::all().take(whole), whole});
    if (!block->memory && posix_memalign(&block->memory, unit, whole) == 0 && large)
      madvise(block->memory, whole, MADV_HUGEPAGE);
    if (block->memory) {
      void* const memory = block->memory;
      const auto give_back = [](void* context) {
        const std::unique_ptr<KeptBlocks::Block> block(static_cast<KeptBlocks::Block*>(context));
        KeptBlocks::all().give_back(*block);
      };
      t.storage().set_data_ptr_noswap({memory, block.release(), give_back, at::kCPU});
      t.storage().set_nbytes(bytes);
      t.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides);
      return t;
    }
    KeptBlocks::all().give_up();
  }
#endif
  return at::empty_strided(sizes, strides, options);
}

inline at::Tensor fresh(at::IntArrayRef sizes, at::MemoryFormat format, const at::TensorOptions& options) {
  return format == at::MemoryFormat::ChannelsLast ? fresh(sizes, c10::get_channels_last_strides_2d(sizes), options)
                                                  : fresh(sizes, c10::contiguous_strides(sizes), options);
}

// Memory for the time of one call.
inline at::Tensor workspace(int64_t bytes) { return fresh({bytes}, {1}, at::kByte); }

}  // namespace fastarch
