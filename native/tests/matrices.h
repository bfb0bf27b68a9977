// Stored matrices with random contents in buffers that end with their last byte, and what the
// elements mean, one at a time, by the words of windlass_cpu.h.
#pragma once

#include "check.h"

namespace test {

/// How a random matrix is stored.
struct Storage {
  int32_t code, packing;
  int32_t scale = WL_S_NONE, zero = WL_Z_NONE;
  enum { ROWS, TRANSPOSED, INTERLEAVED, STRIDED } layout = ROWS;  // of WL_ROWS
  int64_t block_n = 1, block_k = int64_t(1) << 40;
  bool grouped = false;    // a group for each k
  bool any_bits = false;   // NaN, infinities and denormals among codes and scales
};

const char *name_of(const Storage &storage);

/// A matrix and the memory it describes. Neither copied nor moved: the structure holds addresses.
struct Stored {
  Stored(Run &run, const Storage &storage, int64_t n, int64_t k);
  Stored(const Stored &) = delete;
  float element(int64_t n, int64_t k) const;
  /// All elements, (n, k).
  std::vector<float> all() const;

  Storage storage;
  wl_matrix m{};
  std::vector<uint8_t> codes, scales;
  std::vector<uint32_t> zeros;
  std::vector<int32_t> groups;
};

/// Every way of storing a matrix that the kernels know, with random blocks, scales and zeros.
std::vector<Storage> all_storages(Run &run);
/// One of them.
Storage any_storage(Run &run);

/// Row `x` times each row of `w`, in double; `bounds`: how far a sum in single precision may be off,
/// in whatever order. With WL_BF16_ACTIVATIONS both sides are rounded as the instruction set in use does.
void multiply(const float *x, const Stored &w, int32_t precision, const float *bias, double *out, double *bounds);

/// Bits of a usual number of a 16-bit type, its size from about 2^exponent to 8 times that.
uint16_t usual_bits(Run &run, int32_t code, int exponent);
float from_bits(int32_t code, uint16_t bits);

}  // namespace test
