// Random signs and normal numbers that are a function of (seed, row, element): Philox 4x32-10 of Salmon,
// Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The same bits come out on the
// CPU, on a GPU and in the PyTorch reference, whatever the chunks: only integers, and single operations of
// IEEE float32 in a fixed order, never contracted to a fused multiply-add (the files that include this are
// compiled so).
#pragma once

#include <cstdint>

#include "hd.h"

namespace flatkern {

struct Random4 {
  std::uint32_t x[4];
};

// What the numbers are for; streams of different kinds never meet.
enum class Stream : std::uint32_t { kSigns = 0, kNormals = 1 };

constexpr std::uint64_t kPhiloxMul0 = 0xD2511F53u, kPhiloxMul1 = 0xCD9E8D57u;
constexpr std::uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;

FLATKERN_HD Random4 philox(std::uint64_t seed, std::uint64_t row, std::uint64_t block, Stream stream) {
  std::uint32_t c0 = static_cast<std::uint32_t>(block), c1 = static_cast<std::uint32_t>(block >> 32);
  std::uint32_t c2 = static_cast<std::uint32_t>(row);
  std::uint32_t c3 = static_cast<std::uint32_t>(row >> 32) ^ (static_cast<std::uint32_t>(stream) << 31);
  std::uint32_t k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = kPhiloxMul0 * c0, p1 = kPhiloxMul1 * c2;
    c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<std::uint32_t>(p1);
    c3 = static_cast<std::uint32_t>(p0);
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

constexpr int kSignsPerBlock = 128, kNormalsPerBlock = 4;

// Sign of an element of the block: bit e of the 128, 0 for +1.
FLATKERN_HD std::uint32_t sign_bit(const Random4& r, int e) {
  return (r.x[e >> 5] >> (e & 31)) & 1u;
}

#ifdef __CUDA_ARCH__
FLATKERN_HD float mul_rn(float a, float b) {
  return __fmul_rn(a, b);
}
FLATKERN_HD float add_rn(float a, float b) {
  return __fadd_rn(a, b);
}
FLATKERN_HD float div_rn(float a, float b) {
  return __fdiv_rn(a, b);
}
FLATKERN_HD float sqrt_rn(float a) {
  return __fsqrt_rn(a);
}
#else
FLATKERN_HD float mul_rn(float a, float b) {
  return a * b;
}
FLATKERN_HD float add_rn(float a, float b) {
  return a + b;
}
FLATKERN_HD float div_rn(float a, float b) {
  return a / b;
}
FLATKERN_HD float sqrt_rn(float a) {
  return __builtin_sqrtf(a);
}
#endif

FLATKERN_HD float float_of_bits(std::uint32_t bits) {
  float f;
  __builtin_memcpy(&f, &bits, sizeof f);
  return f;
}

FLATKERN_HD std::uint32_t bits_of_float(float f) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &f, sizeof bits);
  return bits;
}

// x as the nearest float: both halves are exact, so one rounding decides.
FLATKERN_HD float nearest_float(std::uint32_t x) {
  return add_rn(mul_rn(static_cast<float>(static_cast<std::int32_t>(x >> 16)), 65536.0f),
                static_cast<float>(static_cast<std::int32_t>(x & 0xffffu)));
}

// sqrt(-2 log u) with u = x / 2^32, and 1/2 for x = 0; the logarithm by the series of 2 atanh((m - 1)/(m +
// 1)).
FLATKERN_HD float normal_radius(std::uint32_t x) {
  const float y = nearest_float(x);
  const std::uint32_t bits = bits_of_float(x == 0 ? 0.5f : y);
  // the mantissa moved to [sqrt(1/2), sqrt(2)): subtracting the bits of sqrt(1/2) carries into the exponent
  const std::uint32_t shifted = bits - 0x3f3504f3u;
  const std::int32_t exponent = static_cast<std::int32_t>(shifted) >> 23;
  const float m = float_of_bits((shifted & 0x007fffffu) + 0x3f3504f3u);
  const float s = div_rn(add_rn(m, -1.0f), add_rn(m, 1.0f));
  const float z = mul_rn(s, s);
  float p = 2.0f / 9.0f;
  p = add_rn(mul_rn(p, z), 2.0f / 7.0f);
  p = add_rn(mul_rn(p, z), 2.0f / 5.0f);
  p = add_rn(mul_rn(p, z), 2.0f / 3.0f);
  p = mul_rn(mul_rn(p, z), s);
  const float e = static_cast<float>(exponent - 32);
  // ln 2 in two parts: the exponent times the first is exact
  const float tail = add_rn(p, mul_rn(e, -2.12194440054690583e-4f));
  const float log = add_rn(mul_rn(e, 0.693359375f), add_rn(tail, mul_rn(s, 2.0f)));
  const float square = mul_rn(log, -2.0f);
  return sqrt_rn(square > 0.0f ? square : 0.0f);
}

// Two independent standard normal numbers from two words: Box and Muller (1958). The second word is an angle:
// a quadrant, and a fraction in [-1/2, 1/2) of a right angle.
FLATKERN_HD void normal_pair(std::uint32_t x0, std::uint32_t x1, float* first, float* second) {
  const float r = normal_radius(x0);
  const std::int32_t centred = static_cast<std::int32_t>(x1 & 0x3fffffffu) - 0x20000000;
  const float t = mul_rn(static_cast<float>(centred), 1.4629180792671596e-9f);  // pi / 2^31
  const float z = mul_rn(t, t);
  float c = -1.0f / 3628800.0f;
  c = add_rn(mul_rn(c, z), 1.0f / 40320.0f);
  c = add_rn(mul_rn(c, z), -1.0f / 720.0f);
  c = add_rn(mul_rn(c, z), 1.0f / 24.0f);
  c = add_rn(mul_rn(c, z), -0.5f);
  c = add_rn(mul_rn(c, z), 1.0f);
  float s = 1.0f / 362880.0f;
  s = add_rn(mul_rn(s, z), -1.0f / 5040.0f);
  s = add_rn(mul_rn(s, z), 1.0f / 120.0f);
  s = add_rn(mul_rn(s, z), -1.0f / 6.0f);
  s = add_rn(mul_rn(mul_rn(s, z), t), t);
  const std::uint32_t quadrant = x1 >> 30;
  const float along = (quadrant & 1u) ? s : c, across = (quadrant & 1u) ? c : s;
  // (c, s), (-s, c), (-c, -s), (s, -c)
  const std::uint32_t flip_first = ((quadrant + 1u) & 2u) << 30, flip_second = (quadrant & 2u) << 30;
  *first = mul_rn(r, float_of_bits(bits_of_float(along) ^ flip_first));
  *second = mul_rn(r, float_of_bits(bits_of_float(across) ^ flip_second));
}

}  // namespace flatkern
