// Workers wait awake for a moment before they sleep: the calls of a layer come some 100 us apart, and
// waking a sleeping virtual core takes about as long (measured: a token of a small model 53 ms, 41 awake).
#include "pool.h"

#include <immintrin.h>
#include <pthread.h>
#include <sched.h>

#include <chrono>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace wl {
namespace {

constexpr int SPINS = 2000;  // about 20 us
constexpr std::chrono::microseconds AWAKE{400};  // then others may have the core between two looks

/// Waits until `value` differs from `old`.
void await_change(std::atomic<uint32_t> &value, uint32_t old) {
  for (int i = 0; i < SPINS; i++) {
    if (value.load(std::memory_order_acquire) != old) return;
    _mm_pause();
  }
  const auto end = std::chrono::steady_clock::now() + AWAKE;
  while (std::chrono::steady_clock::now() < end) {
    if (value.load(std::memory_order_acquire) != old) return;
    sched_yield();
  }
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

}  // namespace

void Team::begin(uint32_t phase) {
  phase_ = phase;
  shared_[phase & 1].store(0, std::memory_order_relaxed);
  for (size_t i = phase & 1; i < own_.size(); i += 2) own_[i].taken.store(0, std::memory_order_relaxed);
}

void Team::barrier() {
  if (size_ == 1) {
    begin(phase_ + 1);
    return;
  }
  const uint32_t turn = turn_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
    arrived_.store(0, std::memory_order_relaxed);
    begin(phase_ + 1);
    turn_.store(turn + 1, std::memory_order_release);
    turn_.notify_all();
    return;
  }
  await_change(turn_, turn);
}

class Pool {
 public:
  ~Pool() { resize(1); }

  void resize(int threads) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (threads == team_.size_) return;
    stop();
    team_.size_ = threads;
    team_.own_ = std::vector<Team::Cursor>(size_t(2 * threads));
    quit_ = false;
    for (int i = 1; i < threads; i++)
      workers_.emplace_back([this, i, seen = start_.load()] { serve(i, seen); });
  }

  void run(Task task, void *context) {
    std::lock_guard<std::mutex> lock(mutex_);
    task_ = task;
    context_ = context;
    team_.begin(0);
    if (team_.size_ > 1) {
      start_.fetch_add(1, std::memory_order_release);
      start_.notify_all();
    }
    task(team_, 0, context);
    team_.barrier();  // all have left the task
  }

  int size() {
    std::lock_guard<std::mutex> lock(mutex_);
    return team_.size_;
  }

 private:
  void serve(int thread, uint32_t seen) {
    while (true) {
      await_change(start_, seen);
      seen++;
      if (quit_) return;
      task_(team_, thread, context_);
      team_.barrier();
    }
  }

  void stop() {
    if (workers_.empty()) return;
    quit_ = true;
    start_.fetch_add(1, std::memory_order_release);
    start_.notify_all();
    for (std::thread &worker : workers_) worker.join();
    workers_.clear();
  }

  std::mutex mutex_;
  std::vector<std::thread> workers_;
  std::atomic<uint32_t> start_{0};
  Team team_;
  Task task_ = nullptr;
  void *context_ = nullptr;
  bool quit_ = false;
};

namespace {

// Threads do not survive a fork: the child starts with a pool of its own, of one thread.
std::unique_ptr<Pool> &pool() {
  static std::unique_ptr<Pool> instance = [] {
    pthread_atfork(nullptr, nullptr, [] {
      pool().release();
      pool() = std::make_unique<Pool>();
    });
    return std::make_unique<Pool>();
  }();
  return instance;
}

}  // namespace

void run_team(Task task, void *context) { pool()->run(task, context); }
void set_threads(int threads) { pool()->resize(threads < 1 ? 1 : threads); }
int get_threads() { return pool()->size(); }

}  // namespace wl
