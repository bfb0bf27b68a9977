// Runs every test with every instruction set of this machine.
//     test_native [--quick] [--only NAME] [--skip NAME] [--set NAME] [--expect SETS]
// SETS: the instruction sets that must be available, comma separated; "" where none may be.
#include <chrono>
#include <cstdarg>
#include <sstream>

#include "check.h"

namespace test {

namespace {
int failures = 0, printed = 0;
constexpr int MOST_PRINTED = 5;  // of a test
}  // namespace

std::vector<Test> &tests() {
  static std::vector<Test> all;
  return all;
}

void fail(const char *file, int line, const std::string &what) {
  failures++;
  if (printed++ < MOST_PRINTED) std::printf("%s:%d: %s: %s\n", file, line, wl_in_use(), what.c_str());
}

std::string text(const char *format, ...) {
  char buffer[400];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return buffer;
}

}  // namespace test

int main(int count, char **arguments) {
  int scale = 8;
  std::string only, only_set, skipped, expected = wl_available();
  for (int i = 1; i < count; i++) {
    if (!std::strcmp(arguments[i], "--quick")) scale = 1;
    if (!std::strcmp(arguments[i], "--only") && i + 1 < count) only = arguments[++i];
    if (!std::strcmp(arguments[i], "--set") && i + 1 < count) only_set = arguments[++i];
    if (!std::strcmp(arguments[i], "--skip") && i + 1 < count) skipped = arguments[++i];
    if (!std::strcmp(arguments[i], "--expect") && i + 1 < count) expected = arguments[++i];
  }
  if (wl_abi_version() != WL_ABI_VERSION || wl_use("no such set") != WL_E_ARGUMENT) return 2;
  std::printf("instruction sets: %s\n", *wl_available() ? wl_available() : "none");
  if (expected != wl_available()) return 2;
  std::stringstream sets(wl_available());
  std::string set;
  while (std::getline(sets, set, ',')) {
    if (wl_use(set.c_str()) != WL_OK || set != wl_in_use()) return 2;
    if (!only_set.empty() && set != only_set) continue;
    for (const test::Test &one : test::tests()) {
      if ((!only.empty() && only != one.name) || skipped == one.name) continue;
      const int before = test::failures;
      test::printed = 0;
      const auto start = std::chrono::steady_clock::now();
      test::Run run(2026, scale);
      one.body(run);
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
      std::printf("%-8s %-50s %s %5.2f s\n", set.c_str(), one.name, test::failures == before ? "ok    " : "FAILED", took.count());
      std::fflush(stdout);
    }
  }
  if (test::failures) std::printf("%d checks failed\n", test::failures);
  return test::failures ? 1 : 0;
}
