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

#include <atomic>
#include <cstdlib>
#include <memory>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastarch {

// Where uninitialised memory has to be poisoned, it must be torch's own, and nothing may be left in it of another call.
inline bool poisons_memory() {
  return at::globalContext().deterministicAlgorithms() && at::globalContext().deterministicFillUninitializedMemory();
}

// An uninitialised tensor; a large one on huge pages, because page faults are most of the cost of fresh memory: a copy
// of 205 MB took 24 ms into warm memory, 114 into fresh, 40 into fresh on huge pages. It begins on such a page, or its
// ends fault in small ones: of 26 MB 850 times, which took 6.3 ms where computing took 2.3.
inline at::Tensor fresh(at::IntArrayRef sizes, at::IntArrayRef strides, const at::TensorOptions& options) {
#if defined(__linux__)
  constexpr size_t PAGE = 2 << 20, LARGE = 2 * PAGE;  // what the last page wastes is at most half
  const size_t bytes = c10::multiply_integers(sizes) * options.dtype().itemsize();
  void* memory = nullptr;
  if (bytes >= LARGE && !poisons_memory() && c10::GetCPUAllocator() == c10::GetDefaultCPUAllocator() &&
      posix_memalign(&memory, PAGE, bytes) == 0) {
    madvise(memory, (bytes + PAGE - 1) / PAGE * PAGE, MADV_HUGEPAGE);
    at::Tensor t = at::empty({0}, options);
    t.storage().set_data_ptr_noswap({memory, memory, std::free, at::kCPU});
    t.storage().set_nbytes(bytes);
    t.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides);
    return t;
  }
#endif
  return at::empty_strided(sizes, strides, options);
}

inline at::Tensor fresh(at::IntArrayRef sizes, at::MemoryFormat format, const at::TensorOptions& options) {
  return format == at::MemoryFormat::ChannelsLast ? fresh(sizes, c10::get_channels_last_strides_2d(sizes), options)
                                                  : fresh(sizes, c10::contiguous_strides(sizes), options);
}

// Memory for the time of one call, kept for the next. In fresh memory vgg_b5, which transforms 17 MB of filters, took
// from 8 to 12 ms, as malloc happened to give the pages back in between or not; in kept memory 8 to 9.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : buffer_(kept_.exchange(nullptr)) {
    if (!buffer_ || int64_t(buffer_->nbytes()) < bytes || poisons_memory()) {
      buffer_.reset();
      buffer_ = std::make_unique<at::Tensor>(fresh({bytes}, {1}, at::kByte));
    }
  }
  ~Workspace() {
    if (buffer_->nbytes() <= MOST_KEPT) delete kept_.exchange(buffer_.release());
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* data() const { return buffer_->data_ptr(); }

 private:
  static constexpr size_t MOST_KEPT = 64 << 20;
  static inline std::atomic<at::Tensor*> kept_{nullptr};
  std::unique_ptr<at::Tensor> buffer_;
};

}  // namespace fastarch
