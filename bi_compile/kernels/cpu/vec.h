// Vectors of 64 bytes: f32x16 has 16 floats, f64x8 8 doubles. Loads widen bfloat16 and float16 to float, stores round to nearest even.
//
// The code is compiled with -ffp-contract=off: a product and a sum become one rounding only where `fma` is written.
// GCC's vector extensions carry it to every processor; intrinsics stand behind #ifdef where they save work.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace bi {

using c10::BFloat16;
using c10::Half;

typedef float f32x16 __attribute__((vector_size(64)));
typedef double f64x8 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef int64_t i64x8 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef float f32x8 __attribute__((vector_size(32)));

// The type that T is computed in, its vector and the number of its lanes.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;
template <class T>
using Vec = std::conditional_t<std::is_same_v<T, double>, f64x8, f32x16>;
template <class T>
inline constexpr int LANES = std::is_same_v<T, double> ? 8 : 16;

template <class To, class From>
inline To bits(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To r;
  std::memcpy(&r, &v, sizeof r);
  return r;
}

template <class V>
inline V read(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
#ifdef __AVX512F__
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline f64x8 fma(f64x8 a, f64x8 b, f64x8 c) { return (f64x8)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
#else
template <class V, class = std::enable_if_t<sizeof(V) == 64>>
inline V fma(V a, V b, V c) {
  V r;
#pragma GCC unroll 16
  for (size_t j = 0; j < sizeof(V) / sizeof(a[0]); ++j) r[j] = fma(a[j], b[j], c[j]);
  return r;
}
#endif

// The adjacent-pairs tree over lanes: ((0+1)+(2+3)) + ((4+5)+(6+7)) + ...; for 16 vectors at once or within an array.
template <int N, class V>
inline V tree(const V* lane) {
  if constexpr (N == 1)
    return lane[0];
  else
    return tree<N / 2>(lane) + tree<N / 2>(lane + N / 2);
}

template <class V, class S = std::remove_cvref_t<decltype(V{}[0])>>
inline S tree(V v) {
  S lane[sizeof(V) / sizeof(S)];
  std::memcpy(lane, &v, sizeof lane);
  return tree<sizeof(V) / sizeof(S)>(lane);
}

// ---- loads ----

inline f32x16 load(const float* p) { return read<f32x16>(p); }
inline f64x8 load(const double* p) { return read<f64x8>(p); }
inline f32x16 load(const BFloat16* p) { return bits<f32x16>(__builtin_convertvector(read<u16x16>(p), u32x16) << 16); }
inline f32x16 load(const Half* p) {
#ifdef __AVX512F__
  return (f32x16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#else
  f32x16 v;
  for (int j = 0; j < 16; ++j) v[j] = p[j];
  return v;
#endif
}

// The first n elements at p, zeros behind them; nothing is read past them.
template <class T>
inline Vec<T> load(const T* p, int64_t n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (std::is_same_v<T, float>) return (f32x16)_mm512_maskz_loadu_ps((1u << n) - 1, p);
  if constexpr (std::is_same_v<T, double>) return (f64x8)_mm512_maskz_loadu_pd((1u << n) - 1, p);
  if constexpr (sizeof(T) == 2) {
    auto v = _mm256_maskz_loadu_epi16((1u << n) - 1, p);
    return load(reinterpret_cast<const T*>(&v));
  }
#endif
  alignas(64) T part[LANES<T>] = {};
  std::memcpy(part, p, n * sizeof(T));
  return load(part);
}

// ---- stores ----

inline void store(float* p, f32x16 v) { std::memcpy(p, &v, sizeof v); }
inline void store(double* p, f64x8 v) { std::memcpy(p, &v, sizeof v); }
inline void store(BFloat16* p, f32x16 v) {
  u32x16 b = bits<u32x16>(v);
  u32x16 rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  u32x16 nan = u32x16{} + 0x7fc0;
  u16x16 r = __builtin_convertvector(v != v ? nan : rounded, u16x16);
  std::memcpy(p, &r, sizeof r);
}
inline void store(Half* p, f32x16 v) {
#ifdef __AVX512F__
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int j = 0; j < 16; ++j) p[j] = Half(v[j]);
#endif
}

template <class T>
inline void store(T* p, Vec<T> v, int64_t n) {
  alignas(64) T part[LANES<T>];
  store(part, v);
  std::memcpy(p, part, n * sizeof(T));
}

// f(first element, number of elements) for each vector of a row; the last one may be partial.
template <int W, class F>
inline void each_vector(int64_t n, F f) {
  int64_t i = 0;
  for (; i + W <= n; i += W) f(i, std::integral_constant<int, W>{});
  if (i < n) f(i, n - i);
}
// The two kinds of loads and stores that each_vector asks for.
template <class T, int W>
inline Vec<T> load(const T* p, std::integral_constant<int, W>) {
  return load(p);
}
template <class T, int W>
inline void store(T* p, Vec<T> v, std::integral_constant<int, W>) {
  store(p, v);
}

// ---- one rounding from double ----

// double to float, the last bit set if anything was cut off, so that the next, narrower rounding sees it.
inline float round_to_odd(double d) {
  float f = static_cast<float>(d);
  if (static_cast<double>(f) == d || d != d) return f;
  uint32_t b = bits<uint32_t>(f);
  if (std::fabs(static_cast<double>(f)) > std::fabs(d)) --b;
  return bits<float>(b | 1);
}

template <class T>
inline T narrow(double d) {
  if constexpr (std::is_same_v<T, double>)
    return d;
  else if constexpr (std::is_same_v<T, float>)
    return static_cast<float>(d);
  else
    return static_cast<T>(round_to_odd(d));
}

// ---- exp ----

// exp(x) in float: x = n ln2 + r, |r| <= ln2/2, 2^n (1 + r + r^2 p(r)); the polynomial is Taylor's to r^7, whose
// remainder is below 2^-28 of the result. Correct into the subnormals; inf, 0 and NaN where exp has them.
inline f32x16 exp(f32x16 x) {
  const f32x16 one = f32x16{} + 1.f;
  x = x < f32x16{} - 104.f ? f32x16{} - 104.f : x;
  x = x > f32x16{} + 89.f ? f32x16{} + 89.f : x;
  const f32x16 magic = f32x16{} + 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  f32x16 n = fma(x, f32x16{} + 1.44269504f, magic) - magic;
  f32x16 r = fma(n, f32x16{} - 0.693145752f, x);
  r = fma(n, f32x16{} - 1.42860677e-6f, r);
  f32x16 p = fma(r, f32x16{} + 1.98412698e-4f, f32x16{} + 1.38888889e-3f);
  p = fma(p, r, f32x16{} + 8.33333333e-3f);
  p = fma(p, r, f32x16{} + 4.16666667e-2f);
  p = fma(p, r, f32x16{} + 1.66666667e-1f);
  p = fma(p, r, f32x16{} + 0.5f);
  f32x16 e = one + fma(r * r, p, r);
  // 2^n in two factors, since n reaches from -150 to 128; NaN has no integer, and any factor leaves it one
  i32x16 i = __builtin_convertvector(x == x ? n : f32x16{}, i32x16);
  i32x16 half = i >> 1;
  return e * bits<f32x16>((half + 127) << 23) * bits<f32x16>((i - half + 127) << 23);
}

inline f64x8 exp(f64x8 x) {
  for (int j = 0; j < 8; ++j) x[j] = std::exp(x[j]);
  return x;
}

// ---- widening to double ----

inline f64x8 low(f32x16 v) { return __builtin_convertvector(bits<f32x8>(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7)), f64x8); }
inline f64x8 high(f32x16 v) { return __builtin_convertvector(bits<f32x8>(__builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15)), f64x8); }

// v times a factor in double, rounded once to v's type.
inline f32x16 scale(f32x16 v, double by) {
  f32x8 lo = __builtin_convertvector(low(v) * by, f32x8), hi = __builtin_convertvector(high(v) * by, f32x8);
  return __builtin_shufflevector(lo, hi, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
inline f64x8 scale(f64x8 v, double by) { return v * by; }

#ifdef __AVX512F__
// ---- words ----

// 16 x 16 words, transposed.
inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // r[i + j] holds in its quarter q the column 4 q + j of the rows i .. i + 3
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    t[12 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
  }
  for (int j = 0; j < 4; ++j) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[4 + j], 0x88);
    r[4 + j] = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0x88);
    r[8 + j] = _mm512_shuffle_i32x4(t[j], t[4 + j], 0xdd);
    r[12 + j] = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0xdd);
  }
}

// To words[j] word j of each of 16 runs of `k` elements, `ld` apart, of which there are `count`; zeros for the others. read(p, k): a run.
template <class T, class Read>
inline void lanes_of(__m512i (&words)[16], const T* x, int64_t ld, int64_t count, int64_t k, const Read& read) {
  for (int64_t i = 0; i < 16; ++i) words[i] = i < count ? (__m512i)read(x + i * ld, k) : __m512i{};
  transpose(words);
}
#endif

}  // namespace bi
