// Threads that run one function together, the caller among them.
#pragma once

#include <atomic>
#include <cstdint>

namespace wl {

/// What a task sees: which thread it is, a barrier, and counters to share work by.
class Team {
 public:
  int size() const { return size_; }
  /// Returns when all threads are here.
  void barrier();
  /// Next of `count` items of the current phase, or -1. All threads of a phase pass the same count
  /// and call `barrier` between phases.
  int64_t next(int64_t count) {
    int64_t i = cursor_[phase_ & 1].fetch_add(1, std::memory_order_relaxed);
    return i < count ? i : -1;
  }

 private:
  friend class Pool;
  int size_ = 1;
  std::atomic<int> arrived_{0};
  std::atomic<uint32_t> turn_{0};
  std::atomic<int64_t> cursor_[2] = {};
  uint32_t phase_ = 0;  // changed by the last thread at a barrier
};

using Task = void (*)(Team &, int thread, void *context);

/// Runs `task` on the set number of threads and returns when all have ended. One caller at a time.
void run_team(Task task, void *context);
void set_threads(int threads);
int get_threads();

}  // namespace wl
