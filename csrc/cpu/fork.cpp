// A child of a process that has computed must compute as well.
#if defined(__linux__)
#include <pthread.h>

// Of the runtime that torch has loaded: OpenMP 5.0, null in one that is older; and of LLVM's and Intel's alone, which
// start again in a child by themselves, and end more than the threads of whoever asks.
extern "C" __attribute__((weak)) int omp_pause_resource_all(int kind);
extern "C" __attribute__((weak)) int kmp_get_blocktime();

namespace {

// GNU's OpenMP keeps threads for the next parallel region, believes in a forked child that they are still there, and
// waits for them for ever: any large operation would hang there, torch's as well as ours. So it ends them before a fork
// of the thread that they belong to (which took 3 ms), and starts them again when they are wanted. Without them there
// is nothing to end (14 us).
void end_threads() {
  constexpr int HARD = 2;  // omp_pause_hard
  if (omp_pause_resource_all && !kmp_get_blocktime) omp_pause_resource_all(HARD);
}

[[maybe_unused]] const int registered = pthread_atfork(end_threads, nullptr, nullptr);

}  // namespace
#endif
