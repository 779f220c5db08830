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

// Blocks of huge pages that were given back, the oldest first, for the next one that asks for as many bytes: a page
// that is still there need not be cleared again. As malloc does, it keeps blocks of up to 32 MB, and four of those in
// all. A lock that is taken is no reason to wait: after a fork its owner may not exist.
class KeptBlocks {
 public:
  struct Block {
    void* memory;
    size_t bytes;
  };

  static constexpr size_t PAGE = 2 << 20, SMALLEST = 2 * PAGE;  // what a block's last page wastes is at most half

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
  constexpr size_t PAGE = KeptBlocks::PAGE;
  const size_t bytes = c10::multiply_integers(sizes) * options.dtype().itemsize();
  const size_t whole = (bytes + PAGE - 1) / PAGE * PAGE;
  if (bytes >= KeptBlocks::SMALLEST && !poisons_memory() && c10::GetCPUAllocator() == c10::GetDefaultCPUAllocator()) {
    at::Tensor t = at::empty({0}, options);  // whatever can throw comes before the memory that would be lost
    std::unique_ptr<KeptBlocks::Block> block(new KeptBlocks::Block{KeptBlocks::all().take(whole), whole});
    if (!block->memory && posix_memalign(&block->memory, PAGE, whole) == 0)
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
