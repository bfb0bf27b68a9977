// The smallest test framework: named functions, checks that say where, random numbers that can be
// repeated.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../include/windlass_cpu.h"

namespace test {

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
constexpr float DENORMAL = 1e-41f;

/// What a test gets: random numbers, and how often to try random shapes.
class Run {
 public:
  Run(uint64_t seed, int scale) : engine_(seed), scale_(scale) {}
  /// `count` tries in a full run, fewer in a quick one.
  int tries(int count) const { return std::max(1, count * scale_ / 8); }
  int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine_); }
  bool chance(double p) { return std::bernoulli_distribution(p)(engine_); }
  float normal() { return std::normal_distribution<float>()(engine_); }
  uint32_t bits() { return uint32_t(engine_()); }
  template <typename T>
  T pick(std::initializer_list<T> from) { return from.begin()[between(0, int64_t(from.size()) - 1)]; }
  /// Sizes that end everywhere in and beside vectors and blocks.
  int64_t size(int64_t most) {
    const int64_t usual = pick<int64_t>({1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 257, 512, 513, most});
    return chance(0.5) && usual <= most ? usual : between(1, most);
  }
  std::vector<float> normals(int64_t count) {
    std::vector<float> x(static_cast<size_t>(count));
    for (float &one : x) one = normal();
    return x;
  }

 private:
  std::mt19937_64 engine_;
  int scale_;
};

struct Test {
  const char *name;
  void (*body)(Run &);
};

std::vector<Test> &tests();
/// Counts a failure and prints it, of each test the first few; the test goes on.
void fail(const char *file, int line, const std::string &what);

struct Register {
  Register(const char *name, void (*body)(Run &)) { tests().push_back({name, body}); }
};

std::string text(const char *format, ...) __attribute__((format(printf, 1, 2)));

/// Whether two floats have the same bits, or both are NaN.
inline bool same(float a, float b) { return (std::isnan(a) && std::isnan(b)) || !std::memcmp(&a, &b, 4); }
/// The index of the first difference, or -1.
inline int64_t first_difference(const float *a, const float *b, int64_t count) {
  for (int64_t i = 0; i < count; i++)
    if (!same(a[i], b[i])) return i;
  return -1;
}

/// Within `bound` of the expected value; infinities and NaN must be met exactly.
inline bool near(double got, double expected, double bound) {
  if (std::isnan(expected)) return std::isnan(got);
  if (std::isinf(expected)) return got == expected;
  return std::fabs(got - expected) <= bound;
}

}  // namespace test

#define TEST(name)                                        \
  static void name(test::Run &);                          \
  static const test::Register register_##name(#name, name); \
  static void name([[maybe_unused]] test::Run &run)

#define CHECK(condition, ...)                                                    \
  do {                                                                           \
    if (!(condition)) test::fail(__FILE__, __LINE__, #condition ": " + test::text(__VA_ARGS__)); \
  } while (0)
