// The pool of threads: any number, changed between calls, several callers, a fork.
#include <sys/wait.h>
#include <unistd.h>

#include <thread>

#include "matrices.h"

namespace {

constexpr int64_t ROWS = 40, WIDTH = 64, FEATURES = 200;

struct Work {
  explicit Work(test::Run &run) : w(run, {.code = WL_BF16, .packing = WL_ROWS}, FEATURES, WIDTH), x(run.normals(ROWS * WIDTH)) {
    wl_set_threads(1);
    expected = result();
  }
  std::vector<float> result() const {
    std::vector<float> out(size_t(ROWS * FEATURES));
    const wl_product product{x.data(), WIDTH, &w.m, nullptr, out.data(), FEATURES};
    CHECK(wl_products(&product, 1, ROWS, WL_FP32_ACTIVATIONS) == WL_OK, "refused");
    return out;
  }
  bool again() const { return result() == expected; }
  test::Stored w;
  std::vector<float> x, expected;
};

}  // namespace

TEST(the_pool_takes_any_number_of_threads) {
  const Work work(run);
  for (int i = 0; i < run.tries(80); i++) {
    const int32_t threads = int32_t(run.between(0, 9));
    CHECK(wl_set_threads(threads) == WL_OK, "%d", threads);
    CHECK(wl_get_threads() == std::max(1, threads), "%d", threads);
    for (int j = 0; j < 10; j++) CHECK(work.again(), "%d threads", threads);
    if (run.chance(0.2)) std::this_thread::sleep_for(std::chrono::milliseconds(3));  // workers fall asleep
  }
  wl_set_threads(1);
}

TEST(callers_take_turns) {
  const Work work(run);
  wl_set_threads(3);
  std::vector<std::thread> callers;
  std::atomic<int> wrong{0};
  for (int i = 0; i < 4; i++)
    callers.emplace_back([&] {
      for (int j = 0; j < 50; j++) wrong += !work.again();
    });
  for (std::thread &caller : callers) caller.join();
  CHECK(wrong == 0, "%d results", wrong.load());
  wl_set_threads(1);
}

#if !defined(__SANITIZE_THREAD__)
TEST(a_forked_child_computes) {
  const Work work(run);
  wl_set_threads(3);
  CHECK(work.again(), "before");
  const pid_t child = fork();
  if (child == 0) {
    const bool is_alone = wl_get_threads() == 1;
    const bool alone = work.again();
    wl_set_threads(2);
    _exit(is_alone && alone && work.again() ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child ended with %d", status);
  CHECK(work.again(), "after");
  wl_set_threads(1);
}
#endif
