// Memory for outputs and scratch.
#pragma once

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <atomic>
#include <memory>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastarch {

// Asks for huge pages under a large tensor that nothing has touched yet: page faults are most of the cost of fresh
// memory (a copy of 205 MB took 24 ms into warm memory, 114 into fresh, 40 into fresh on huge pages).
inline at::Tensor advise_huge_pages(at::Tensor fresh) {
#if defined(__linux__)
  constexpr size_t PAGE = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(fresh.data_ptr());
  const uintptr_t first = (begin + PAGE - 1) / PAGE * PAGE, last = (begin + fresh.nbytes()) / PAGE * PAGE;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return fresh;
}

// Memory for the time of one call, kept for the next. In fresh memory vgg_b5, which transforms 17 MB of filters, took
// from 8 to 12 ms, as malloc happened to give the pages back in between or not; in kept memory 8 to 9.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : buffer_(kept_.exchange(nullptr)) {
    // where uninitialised memory has to be poisoned nothing may be left of the last call
    const bool poisoned =
        at::globalContext().deterministicAlgorithms() && at::globalContext().deterministicFillUninitializedMemory();
    if (!buffer_ || int64_t(buffer_->nbytes()) < bytes || poisoned) {
      buffer_.reset();
      buffer_ = std::make_unique<at::Tensor>(advise_huge_pages(at::empty({bytes}, at::kByte)));
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
