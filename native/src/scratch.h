// Memory that kernels keep between calls: one growing buffer for each use and thread.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace wl {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch &) = delete;
  ~Scratch() { std::free(data_); }
  /// At least `count` floats, aligned to 64 bytes; what was there before is lost if it grows.
  float *floats(int64_t count) {
    if (count > capacity_) {
      std::free(data_);
      capacity_ = 0;
      const size_t bytes = (size_t(count) * 4 + 4095) / 4096 * 4096;
      data_ = static_cast<float *>(std::aligned_alloc(4096, bytes));
      if (!data_) throw std::bad_alloc();
      capacity_ = int64_t(bytes / 4);
    }
    return data_;
  }

 private:
  float *data_ = nullptr;
  int64_t capacity_ = 0;
};

}  // namespace wl
