// What the two attention operators share: a row of scores, its softmax, and the sum of the values.
#pragma once

#include "product.h"
#include "row_sum.h"

namespace bi {

constexpr int64_t MOST_ROWS = 48;  // of queries at once

inline int64_t up16(int64_t n) { return (n + 15) & ~int64_t{15}; }

struct Scores;
struct Outputs;
struct Values;

// Sum of p[s] * v[s][j] for one row, keys of probability 0 left out: the product's sums, for values that are not finite.
template <class T>
void sum_of_seen_keys(const Acc<T>* p, const T* v, int64_t ldv, int64_t n, int64_t width, Acc<T>* out) {
  constexpr int W = LANES<T>;
  for (int64_t j = 0; j < width; ++j) {
    out[j] = 0;
    for (int64_t block = 0; block < n; block += BLOCK_K) {
      Acc<T> lane[W] = {};
      for (int64_t s = block; s < std::min(n, block + BLOCK_K); ++s)
        if (p[s] != 0) lane[s % W] = fma(p[s], static_cast<Acc<T>>(v[s * ldv + j]), lane[s % W]);
      out[j] += tree<W>(lane);
    }
  }
}

template <class S>
bool all_finite(const S* x, int64_t n) {
  S zero = 0;
  for (int64_t i = 0; i < n; ++i) zero += x[i] * 0;
  return zero == 0;
}

// A row's keys: scores to exp(score - max) in place. Gives the sum and the maximum (0 where that is infinite). `sink` is one
// more score, of a key without a value; its exp is added last.
template <class S>
std::pair<double, S> exp_row(S* score, int64_t n, S sink = -std::numeric_limits<S>::infinity()) {
  constexpr S none = -std::numeric_limits<S>::infinity();
  S max = std::max(row_max(score, n), sink), shift = max == none ? 0 : max;
  double last = sink == none ? 0 : std::exp(static_cast<double>(sink) - static_cast<double>(shift));
  each_vector<LANES<S>>(n, [&](int64_t i, auto count) { store(score + i, exp(load(score + i, count) - shift), count); });
  // not the halving of row_sum.h for float64: masked keys at the end must not count
  if constexpr (std::is_same_v<S, double>)
    return {sum_block(score, 0, n, [](f64x8 v) { return v; }) + last, shift};
  else
    return {row_sum(score, n) + last, shift};
}

// sums[r][j] = sum of p[r][s] * v[s][j].
template <class T>
void weighted_sums(const Acc<T>* p, int64_t ldp, const T* v, int64_t ldv, int64_t rows, int64_t n, int64_t width, Acc<T>* sums,
           int64_t ld) {
  using Op = Fma<T>;
  constexpr int64_t W = Op::W;
  int64_t s = 0;
  do {
    int64_t keys = std::min(BLOCK_K, n - s);
    for (int64_t j = 0; j < width; j += W) {
      const T* panel = v + s * ldv + j;
      int64_t ldb = ldv;
      if (width - j < W) {
        T* packed = scratch<Values, T>(keys * W);
        for (int64_t i = 0; i < keys; ++i) Op::pack(packed + i * W, panel, ldv, i, keys, width - j);
        panel = packed, ldb = W;
      }
      column_block<Op>(p + s, ldp, panel, ldb, rows, keys, s == 0, sums + j, ld);
    }
    s += keys;
  } while (s < n);
}

// What attention does with scores, for `rows` rows of n keys and the values v [n, Dv]: rows that exp_row has seen, zero from
// their last key on. total: the rows' sums of exp. to(r): where row r of the result goes.
template <class T, class To>
void values_of_rows(const Acc<T>* p, int64_t ldp, const double* total, const T* v, int64_t ldv, int64_t rows, int64_t n, int64_t Dv, To to) {
  int64_t ld = up16(Dv);
  auto sums = scratch<Outputs, Acc<T>>(rows * ld);
  weighted_sums<T>(p, ldp, v, ldv, rows, n, Dv, sums, ld);
  for (int64_t r = 0; r < rows; ++r) {
    auto sum = sums + r * ld;
    if (!all_finite(sum, Dv)) sum_of_seen_keys(p + r * ldp, v, ldv, n, Dv, sum);
    double inverse = total[r] == 0 ? 0 : 1 / total[r];
    T* out = to(r);
    each_vector<LANES<T>>(Dv, [&](int64_t i, auto count) { store(out + i, scale(load(sum + i), inverse), count); });
  }
}

}  // namespace bi
