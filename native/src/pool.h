// Threads that run one function together, the caller among them.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

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
    int64_t i = shared_[phase_ & 1].fetch_add(1, std::memory_order_relaxed);
    return i < count ? i : -1;
  }
  /// The same in another order: each thread has a stretch of the items, so that it reads memory in
  /// one direction, and takes from the others' when it is through. A phase uses one of the two.
  int64_t next_beside(int thread, int64_t count) {
    for (int i = 0; i < size_; i++) {
      const int of = (thread + i) % size_;
      Cursor &cursor = own_[size_t(2 * of) + (phase_ & 1)];
      const int64_t first = first_beside(of, count), end = first_beside(of + 1, count);
      if (first + cursor.taken.load(std::memory_order_relaxed) >= end) continue;
      const int64_t item = first + cursor.taken.fetch_add(1, std::memory_order_relaxed);
      if (item < end) return item;
    }
    return -1;
  }
  /// The first item of a thread's stretch.
  int64_t first_beside(int thread, int64_t count) const { return thread * count / size_; }

 private:
  friend class Pool;
  struct alignas(64) Cursor {
    std::atomic<int64_t> taken{0};
  };
  void begin(uint32_t phase);

  int size_ = 1;
  std::atomic<int> arrived_{0};
  std::atomic<uint32_t> turn_{0};
  std::atomic<int64_t> shared_[2] = {};
  std::vector<Cursor> own_ = std::vector<Cursor>(2);  // of each thread, for even and odd phases
  uint32_t phase_ = 0;  // changed by the last thread at a barrier
};

using Task = void (*)(Team &, int thread, void *context);

/// Runs `task` on the set number of threads and returns when all have ended. One caller at a time.
void run_team(Task task, void *context);
void set_threads(int threads);
int get_threads();

}  // namespace wl
