// What XLA hands over, and work for all threads that it lends.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace native {

using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;

// Those that units run on: the pool's, or where XLA has none this one alone.
inline int64_t Threads(const ffi::ThreadPool& pool) { return std::max<int64_t>(1, pool.num_threads()); }

constexpr int kTurns = 1000;  // of waiting awake: tens of microseconds

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Runs units 0 .. count - 1 on this thread and the pool's; returns when all are done.
inline void ForAll(ffi::ThreadPool& pool, int64_t count, std::function<void(int64_t)> run) {
  struct State {
    std::function<void(int64_t)> run;
    int64_t count;
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable all;
    void Work() {
      for (int64_t i; (i = next.fetch_add(1)) < count;) {
        run(i);
        if (done.fetch_add(1) + 1 == count) {
          std::lock_guard<std::mutex> lock(mutex);
          all.notify_all();
        }
      }
    }
  };
  auto state = std::make_shared<State>();
  state->run = std::move(run);
  state->count = count;
  const int64_t helpers = std::min<int64_t>(Threads(pool), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([state] { state->Work(); });
  state->Work();
  // Others are at their last units: to sleep and be woken takes longer than most of these.
  for (int turn = 0; turn < kTurns && state->done.load() < count; ++turn) Pause();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all.wait(lock, [&] { return state->done.load() == count; });
}

}  // namespace native
