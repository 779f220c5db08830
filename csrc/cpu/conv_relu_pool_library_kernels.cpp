// conv_relu_pool after a library's convolution: y = pool(relu(v)) and the index, v [N, OH, OW, G * K] channels-last.
#include "cpu/conv_relu_pool_window.h"

namespace {

template <class Storage>
struct Library {
  using T = Compute<Storage>;
  static constexpr int64_t WIDTH =
      4 * LANES<T>;  // channels that go through the ring together: a cache line of each row

  static int64_t packed_bytes(const ConvReluPool&) { return 0; }
  static int64_t pack_tasks(const ConvReluPool&) { return 0; }
  static void pack(const ConvReluPool&, const void*, const void*, const void*, void*, int64_t) {}
  static int64_t scratch_bytes(const ConvReluPool& p) { return pool_rows_scratch<1, T>(p, WIDTH) * sizeof(T); }

  // A task is a chunk of pooled rows of one image.
  static int64_t chunks(const ConvReluPool& p) { return ceil_div(p.PH, rows_per_chunk(p)); }
  static int64_t tasks(const ConvReluPool& p) { return p.N * chunks(p); }

  template <class Pool>
  static void run_chunk(const ConvReluPool& p, const Storage* v, const Storage* r, Storage* y, uint8_t* index,
                        int64_t chunk, T* scratch) {
    const int64_t begin = chunk * rows_per_chunk(p), end = least(begin + rows_per_chunk(p), p.PH);
    const int64_t channels = p.G * p.K;
    for (int64_t k = 0; k < channels; k += WIDTH) {
      const int64_t live = least(WIDTH, channels - k), width = ceil_div(live, LANES<T>) * LANES<T>;
      const auto convolve = [&](int64_t row, const Ring<T>& ring) {
        copy_block(ring[row], {width, 1}, v + row * p.OW * channels + k, {channels, 1}, p.OW, live);
      };
      pool_rows<1, Pool>(p, begin, end, width, live, convolve, scratch, r ? r + k * p.y.c : r, y + k * p.y.c,
                         index ? index + k * p.index.c : index);
    }
  }

  static void run(const ConvReluPool& p, const void* v, const void*, const void* r, void* y, uint8_t* index,
                  int64_t task, void* scratch) {
    const int64_t n = task / chunks(p);
    with_pool<T>(p, index, [&](auto pool) {
      run_chunk<decltype(pool)>(p, static_cast<const Storage*>(v) + n * p.OH * p.OW * p.G * p.K,
                                r ? static_cast<const Storage*>(r) + n * p.y.n : nullptr,
                                static_cast<Storage*>(y) + n * p.y.n, index ? index + n * p.index.n : nullptr,
                                task % chunks(p), static_cast<T*>(scratch));
    });
  }

  static constexpr ConvReluPoolFwd table = {packed_bytes, pack_tasks, pack, scratch_bytes, tasks, run};
};

}  // namespace

FASTARCH_EXPORT(ConvReluPoolFwds, conv_relu_pool_library) = {
    {Library<float>::table, Library<double>::table, Library<BFloat16>::table, Library<Float16>::table}};
