// Sums over a row of C elements, in double. An operator's row is read in row-major order.
//
// float32, bfloat16, float16: element c belongs to lane c mod 16, lanes in ascending order from +0, then the adjacent-pairs
// tree. float64: blocks of 1024, each in 8 such lanes; the blocks are added by recursive halving of their number.
#pragma once

#include "dtype.h"
#include "parallel.h"

namespace bi {

// The sum of f(c, element) over a row; f takes and gives 8 doubles, c being the first one's place.
template <class F>
double sum_block(const double* x, int64_t first, int64_t n, F f) {
  const i64x8 index = {0, 1, 2, 3, 4, 5, 6, 7};
  f64x8 acc{};
  each_vector<8>(n, [&](int64_t i, auto count) {
    f64x8 v = f(load(x + first + i, count));
    acc += index < static_cast<int64_t>(count) ? v : f64x8{};
  });
  return tree(acc);
}

template <class F>
double sum_halves(const double* x, int64_t first, int64_t n, F f) {
  constexpr int64_t BLOCK = 1024;
  if (n <= BLOCK) return sum_block(x, first, n, f);
  int64_t half = ceil_div(n, BLOCK) / 2 * BLOCK;
  return sum_halves(x, first, half, f) + sum_halves(x, first + half, n - half, f);
}

template <class T, class F>
double row_sum(const T* x, int64_t C, F f) {
  if constexpr (std::is_same_v<T, double>) {
    return sum_halves(x, 0, C, f);
  } else {
    const i64x8 index = {0, 1, 2, 3, 4, 5, 6, 7};
    f64x8 acc[2] = {};
    each_vector<16>(C, [&](int64_t i, auto count) {
      auto v = load(x + i, count);
      f64x8 lo = f(low(v)), hi = f(high(v));
      int64_t n = count;
      acc[0] += index < n ? lo : f64x8{};
      acc[1] += index + 8 < n ? hi : f64x8{};
    });
    return tree(acc[0]) + tree(acc[1]);
  }
}

template <class T>
double row_sum(const T* x, int64_t C) {
  return row_sum(x, C, [](f64x8 v) { return v; });
}

template <class T>
double row_square_sum(const T* x, int64_t C, double mean) {
  return row_sum(x, C, [=](f64x8 v) { return (v - mean) * (v - mean); });
}

// The largest element, -inf for none; NaN counts as absent (whoever needs it finds it again in the sum of exp).
template <class T>
Acc<T> row_max(const T* x, int64_t C) {
  constexpr int W = LANES<T>;
  constexpr Acc<T> none = -std::numeric_limits<Acc<T>>::infinity();
  Vec<T> m = Vec<T>{} + none;
  int64_t i = 0;
  for (; i + W <= C; i += W) {
    Vec<T> v = load(x + i);
    m = v > m ? v : m;
  }
  Acc<T> best = none;
  for (int j = 0; j < W; ++j) best = m[j] > best ? m[j] : best;
  for (; i < C; ++i) {
    Acc<T> v = static_cast<Acc<T>>(x[i]);
    best = v > best ? v : best;
  }
  return best;
}

// e[c] = exp(x[c] - shift) and the sum of e. e has room for C rounded up to a vector, and is zero there.
template <class T>
double row_exp(const T* x, int64_t C, Acc<T> shift, Acc<T>* e) {
  each_vector<LANES<T>>(C, [&](int64_t i, auto count) { store(e + i, exp(load(x + i, count) - shift), count); });
  return row_sum(e, C);
}

}  // namespace bi
