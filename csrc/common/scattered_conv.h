// A convolution's cotangents where few of its outputs matter: behind a max-pool, say, only the largest of
// each window.
#pragma once

#include <cstdint>

namespace flatkern {

// One group, two spatial axes. Entry p of channel c of a sample stands at index[c, p] of the plane
// [out_rows, out_cols], the same for all k cotangents of the sample; a negative index is no entry.
struct ScatteredConv {
  std::int64_t cotangents, channels,
      entries;                           // values [n, k, channels, entries], index [n, channels, entries]
  std::int64_t in_channels, rows, cols;  // the layer's input [n, in_channels, rows, cols]
  std::int64_t out_rows, out_cols;
  std::int64_t kernel_rows, kernel_cols;
  std::int64_t stride_rows, stride_cols, padding_rows, padding_cols, dilation_rows, dilation_cols;

  std::int64_t padded_rows() const { return rows + 2 * padding_rows; }
  std::int64_t padded_cols() const { return cols + 2 * padding_cols; }
  std::int64_t padded() const { return padded_rows() * padded_cols(); }
  std::int64_t places() const { return out_rows * out_cols; }
  std::int64_t taps() const { return kernel_rows * kernel_cols; }
};

}  // namespace flatkern
