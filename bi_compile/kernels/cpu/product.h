// The product's arithmetic. K is taken in blocks of 1024, ascending. In a block, element (m, n) is W partial sums (W = 16
// in float, 8 in double), lane j taking the steps k = j mod W in ascending order, each one fused multiply-add from +0;
// then the adjacent-pairs tree over the lanes, then + 0, so that no result is -0. The blocks' sums are added up in order.
// Missing steps of the last W are zeros, which change nothing; nor do whole blocks of zeros.
//
// A step is one element of K; for bfloat16 where the processor has its dot product (AVX512_BF16) it is two, k and k + 1,
// added by that instruction (which takes subnormals for zero). float16, and bfloat16 elsewhere, are widened to float.
//
// Three kernels give these same bits (bfloat16 products on AMX have an order of their own: amx.h), two of them here, for many rows panel.h:
//   dot     both operands contiguous along K: vectors run along K, a tile of up to 6 x 4 elements in registers;
//   column  b contiguous along N: vectors run along N, one accumulator for each lane and row, 4 to 16 lanes at a time.
#pragma once

#include "dtype.h"
#include "parallel.h"

namespace bi {

// How one step is done. A: an element of `a`; B: of `b`; P: of a row of column kernel's panel.
template <class B_>
struct Fma {
  using A = Acc<B_>;
  using B = B_;
  using P = B_;
  using V = Vec<B_>;
  using Sum = Acc<B_>;
  static constexpr int W = LANES<B_>;  // lanes
  static constexpr int PER_STEP = 1;   // elements of K that a lane takes at once
  static V a_at(const A* p) { return load(p); }
  static V b_at(const B* p) { return load(p); }
  static V a_part(const A* p, int64_t n) { return load(p, n); }
  static V b_part(const B* p, int64_t n) { return load(p, n); }
  static V step(V a, V b, V c) { return fma(a, b, c); }
  static V row(const P* p) { return load(p); }
  static V broadcast(const A* a, int64_t k) { return V{} + a[k]; }
  static V broadcast_last(const A* a, int64_t k, int64_t) { return V{} + a[k]; }
  // W columns of row k of b, zeros behind the first n
  static void pack(P* to, const B* b, int64_t ld, int64_t k, int64_t, int64_t n) {
    if (n >= W) return void(std::memcpy(to, b + k * ld, W * sizeof(P)));
    std::memcpy(to, b + k * ld, n * sizeof(P));
    for (int64_t j = n; j < W; ++j) to[j] = P(0.f);
  }
};

#ifdef __AVX512BF16__
struct DotBf16 {
  using A = BFloat16;
  using B = BFloat16;
  using P = uint32_t;
  using V = f32x16;
  using Sum = float;
  static constexpr int W = 16;
  static constexpr int PER_STEP = 2;
  static V a_at(const A* p) { return read<V>(p); }
  static V b_at(const B* p) { return read<V>(p); }
  static V a_part(const A* p, int64_t n) { return (V)_mm512_maskz_loadu_epi16((uint32_t)((uint64_t{1} << n) - 1), p); }
  static V b_part(const B* p, int64_t n) { return a_part(p, n); }
  static V step(V a, V b, V c) { return (V)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b); }
  static V row(const P* p) { return read<V>(p); }
  static V broadcast(const A* a, int64_t s) { return (V)_mm512_set1_epi32(read<int32_t>(a + 2 * s)); }
  static V broadcast_last(const A* a, int64_t s, int64_t k) {
    return 2 * s + 1 < k ? broadcast(a, s) : (V)_mm512_set1_epi32(a[2 * s].x);
  }
  static void pack(P* to, const B* b, int64_t ld, int64_t s, int64_t k, int64_t n) {
    const B* first = b + 2 * s * ld;
    const B* second = first + ld;
    bool pair = 2 * s + 1 < k;
    if (n >= W && pair) {
      auto v = (__builtin_convertvector(read<u16x16>(second), u32x16) << 16) | __builtin_convertvector(read<u16x16>(first), u32x16);
      std::memcpy(to, &v, sizeof v);
      return;
    }
    for (int64_t j = 0; j < W; ++j) to[j] = j < n ? first[j].x | (pair ? uint32_t{second[j].x} << 16 : 0) : 0;
  }
};
template <class T>
using Step = std::conditional_t<std::is_same_v<T, BFloat16>, DotBf16, Fma<T>>;
#else
template <class T>
using Step = Fma<T>;
#endif

#if defined(__AVX2__) && defined(__FMA__) && !defined(__AVX512F__)
#define BI_AVX2
#endif

#ifdef __AVX512F__
inline constexpr int MAX_ROWS = 6;  // 6 x 4 accumulators, 4 vectors of b and one of a: 29 of 32 registers
#elif defined(BI_AVX2)
inline constexpr int MAX_ROWS = 3;  // 3 x 4 accumulators of half a vector, in 16 registers
#else
inline constexpr int MAX_ROWS = 1;
#endif
inline constexpr int TILE_N = 4;
inline constexpr int AHEAD = 2 * TILE_N;  // columns between the one in use and the one that is fetched from memory meanwhile
inline constexpr int64_t BLOCK_K = 1024;  // part of the order of the sum, see above

#ifdef BI_AVX2
// A register holds half a vector of floats, and GCC keeps whole ones in memory: lanes 0 to 7 and 8 to 15 are taken one after the
// other, each over the whole block of K.
inline f32x8 fma(f32x8 a, f32x8 b, f32x8 c) { return (f32x8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline f32x8 load8(const float* p) { return read<f32x8>(p); }
inline f32x8 load8(const BFloat16* p) {
  return (f32x8)_mm256_slli_epi32(_mm256_cvtepu16_epi32(read<__m128i>(p)), 16);
}
inline f32x8 load8(const Half* p) {
#ifdef __F16C__
  return (f32x8)_mm256_cvtph_ps(read<__m128i>(p));
#else
  f32x8 v;
  for (int j = 0; j < 8; ++j) v[j] = p[j];
  return v;
#endif
}
// The first n elements at p, zeros behind them.
template <class T>
inline f32x8 load8(const T* p, int64_t n) {
  T part[8] = {};
  std::memcpy(part, p, std::clamp<int64_t>(n, 0, 8) * sizeof(T));
  return load8(part);
}
template <class Op>
inline constexpr bool in_halves = std::is_same_v<typename Op::Sum, float>;
#else
template <class Op>
inline constexpr bool in_halves = false;
#endif

// ---- dot ----

// Keeps a compiler from loading `v` again with every instruction that uses it: loads are what the tile has least room for.
template <class V>
inline void keep_in_register(V& v) {
#ifdef __AVX512F__
  asm("" : "+v"(v));
#endif
}

// Two vectors' elements 0, 2 of each four, and 1, 3; and their fours 0, 2 and 1, 3.
inline f32x16 even(f32x16 a, f32x16 b) { return __builtin_shufflevector(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30); }
inline f32x16 odd(f32x16 a, f32x16 b) { return __builtin_shufflevector(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31); }
inline f32x16 even_fours(f32x16 a, f32x16 b) { return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27); }
inline f32x16 odd_fours(f32x16 a, f32x16 b) { return __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31); }

template <int MR, int NR, class V, class S>
inline void lane_trees(const V (&acc)[MR][NR], S (&sum)[MR][NR]) {
  if constexpr (NR == 4 && std::is_same_v<V, f32x16>) {
    // each shuffle brings the even and the odd partial sums of two vectors side by side, for four rows at once in the end
    f32x16 quads[ceil_div(MR, 4) * 4] = {};
#pragma GCC unroll 6  // early, or GCC writes the tile to the stack
    for (int m = 0; m < MR; ++m) {
      const f32x16 &a = acc[m][0], &b = acc[m][1], &c = acc[m][2], &d = acc[m][3];
      f32x16 ab = even(a, b) + odd(a, b), cd = even(c, d) + odd(c, d);
      quads[m] = even(ab, cd) + odd(ab, cd);
    }
    for (int m = 0; m < MR; m += 4) {
      const f32x16* q = quads + m;
      f32x16 low = even_fours(q[0], q[1]) + odd_fours(q[0], q[1]), high = even_fours(q[2], q[3]) + odd_fours(q[2], q[3]);
      f32x16 r = even_fours(low, high) + odd_fours(low, high) + 0.f;
      std::memcpy(sum[m], &r, sizeof(S) * 4 * std::min(4, MR - m));
    }
  } else {
    for (int m = 0; m < MR; ++m)
      for (int n = 0; n < NR; ++n) sum[m][n] = tree(acc[m][n]) + S(0);
  }
}

#ifdef BI_AVX2
// Lanes 8 * half and the seven behind it of `dot_tile`: their trees.
template <int MR, int NR, class A, class B>
void dot_half(const A* a, int64_t lda, const B* b, int64_t ldb, int64_t k, int64_t half, float (&sum)[MR][NR]) {
  f32x8 acc[MR][NR] = {};
  int64_t i = half;
  for (; i - half + 16 <= k; i += 16) {
    f32x8 av[MR];
    for (int m = 0; m < MR; ++m) av[m] = load8(a + m * lda + i);
    for (int n = 0; n < NR; ++n) {
      f32x8 bv = load8(b + n * ldb + i);
      for (int m = 0; m < MR; ++m) acc[m][n] = fma(av[m], bv, acc[m][n]);
    }
  }
  if (int64_t rest = k - i; rest > 0)
    for (int n = 0; n < NR; ++n)
      for (int m = 0; m < MR; ++m) acc[m][n] = fma(load8(a + m * lda + i, rest), load8(b + n * ldb + i, rest), acc[m][n]);
  for (int m = 0; m < MR; ++m) {
    __m256 ab = _mm256_hadd_ps((__m256)acc[m][0], (__m256)acc[m][NR > 1]), cd = _mm256_hadd_ps((__m256)acc[m][NR / 2], (__m256)acc[m][NR - 1]);
    __m256 fours = _mm256_hadd_ps(ab, cd);
    float r[4];
    _mm_storeu_ps(r, _mm_add_ps(_mm256_castps256_ps128(fours), _mm256_extractf128_ps(fours, 1)));
    std::memcpy(sum[m], r, sizeof(float) * NR);
  }
}
#endif

// The trees of MR x NR elements over the k elements of one block of K; `prefetch`: b comes from memory.
template <class Op, int MR, int NR>
void dot_lanes(const typename Op::A* a, int64_t lda, const typename Op::B* b, int64_t ldb, int64_t k, bool prefetch,
               typename Op::Sum (&sum)[MR][NR]) {
  using V = typename Op::V;
  constexpr int64_t STEP = Op::W * Op::PER_STEP;
  V acc[MR][NR] = {};
  auto step = [&](auto load_a, auto load_b, int64_t i) {
    V bv[NR];
    for (int n = 0; n < NR; ++n) bv[n] = load_b(b + n * ldb + i);
    for (int m = 0; m < MR; ++m) {
      V av = load_a(a + m * lda + i);
      keep_in_register(av);
      for (int n = 0; n < NR; ++n) acc[m][n] = Op::step(av, bv[n], acc[m][n]);
    }
  };
  int64_t i = 0;
  for (; i + STEP <= k; i += STEP) {
    if (prefetch)
      for (int n = 0; n < NR; ++n) __builtin_prefetch(b + (n + AHEAD) * ldb + i, 0, 2);
    step(Op::a_at, Op::b_at, i);
  }
  if (int64_t rest = k - i)
    step([=](auto p) { return Op::a_part(p, rest); }, [=](auto p) { return Op::b_part(p, rest); }, i);
  lane_trees(acc, sum);
}

// MR x NR elements over the k elements of one block of K; `first`: out is set, else added to; `prefetch`: b comes from memory.
template <class Op, int MR, int NR>
void dot_tile(const typename Op::A* a, int64_t lda, const typename Op::B* b, int64_t ldb, int64_t k,
              bool first, bool prefetch, typename Op::Sum* out, int64_t ldo) {
  typename Op::Sum sum[MR][NR];
#ifdef BI_AVX2
  if constexpr (in_halves<Op>) {
    static_assert(NR == 1 || NR == 4);
    typename Op::Sum high[MR][NR];
    dot_half<MR, NR>(a, lda, b, ldb, k, 0, sum);
    dot_half<MR, NR>(a, lda, b, ldb, k, 8, high);
    for (int m = 0; m < MR; ++m)
      for (int n = 0; n < NR; ++n) sum[m][n] = sum[m][n] + high[m][n] + 0.f;
  } else
#endif
    dot_lanes<Op, MR, NR>(a, lda, b, ldb, k, prefetch, sum);
  for (int m = 0; m < MR; ++m)
    for (int n = 0; n < NR; ++n) out[m * ldo + n] = first ? sum[m][n] : out[m * ldo + n] + sum[m][n];
}
template <class Op, int NR, int MR = MAX_ROWS, class... Args>
inline void dot_rows(int64_t rows, Args... args) {
  if (rows == MR) return dot_tile<Op, MR, NR>(args...);
  if constexpr (MR > 1) dot_rows<Op, NR, MR - 1>(rows, args...);
}

// out[m * ldo + n] for all m < M, n < N: a's rows and b's columns contiguous along K. For blocks that fit a cache.
template <class Op>
void dot_block(const typename Op::A* a, int64_t lda, const typename Op::B* b, int64_t ldb, int64_t M, int64_t N,
               int64_t K, typename Op::Sum* out, int64_t ldo) {
  int64_t tiles = ceil_div(M, MAX_ROWS), k = 0;
  do {
    int64_t kn = std::min(BLOCK_K, K - k);
    for (int64_t i = 0; i < tiles; ++i) {
      int64_t m = M * i / tiles, rows = M * (i + 1) / tiles - m, n = 0;
      bool prefetch = i == 0 && rows > 4;  // fewer are computed as fast as b comes without
      for (; n + TILE_N <= N; n += TILE_N)
        dot_rows<Op, TILE_N>(rows, a + m * lda + k, lda, b + n * ldb + k, ldb, kn, k == 0, prefetch, out + m * ldo + n, ldo);
      for (; n < N; ++n)
        dot_rows<Op, 1>(rows, a + m * lda + k, lda, b + n * ldb + k, ldb, kn, k == 0, prefetch, out + m * ldo + n, ldo);
    }
    k += kn;
  } while (k < K);
}

// ---- column ----

#ifdef BI_AVX2
// Eight columns of `column_tile`.
template <int MR, int L, class P>
void column_half(const float* a, int64_t lda, const P* b, int64_t ldb, int64_t K, bool first, float* out, int64_t ldo) {
  f32x8 group[MR][16 / L];
  for (int g = 0; g < 16 / L; ++g) {
    f32x8 acc[MR][L] = {};
    for (int64_t s = g * L; s < K; s += 16)
      for (int i = 0; i < L; ++i) {
        if (s + i >= K) break;
        f32x8 bv = load8(b + (s + i) * ldb);
        for (int m = 0; m < MR; ++m) acc[m][i] = fma(f32x8{} + a[m * lda + s + i], bv, acc[m][i]);
      }
    for (int m = 0; m < MR; ++m) group[m][g] = tree<L>(acc[m]);
  }
  for (int m = 0; m < MR; ++m) {
    f32x8 sum = tree<16 / L>(group[m]) + f32x8{};
    f32x8 all = first ? sum : read<f32x8>(out + m * ldo) + sum;
    std::memcpy(out + m * ldo, &all, sizeof all);
  }
}
#endif

// MR rows of W columns over the K elements of one block of K, L lanes at a time; `first`: out is set, else added to.
template <class Op, int MR, int L>
void column_tile(const typename Op::A* a, int64_t lda, const typename Op::P* b, int64_t ldb, int64_t K,
                 bool first, typename Op::Sum* out, int64_t ldo) {
  using V = typename Op::V;
#ifdef BI_AVX2
  if constexpr (in_halves<Op>) {
    column_half<MR, L>(a, lda, b, ldb, K, first, out, ldo);
    return column_half<MR, L>(a, lda, b + 8, ldb, K, first, out + 8, ldo);
  }
#endif
  int64_t steps = ceil_div(K, Op::PER_STEP), full = K / Op::PER_STEP / Op::W * Op::W;
  V group[MR][Op::W / L];
  for (int g = 0; g < Op::W / L; ++g) {
    V acc[MR][L] = {};
    for (int64_t s = g * L; s < full; s += Op::W)
      for (int i = 0; i < L; ++i) {
        V bv = Op::row(b + (s + i) * ldb);
        for (int m = 0; m < MR; ++m) acc[m][i] = Op::step(Op::broadcast(a + m * lda, s + i), bv, acc[m][i]);
      }
    for (int i = 0; i < L; ++i) {
      int64_t s = full + g * L + i;
      if (s >= steps) break;
      V bv = Op::row(b + s * ldb);
      for (int m = 0; m < MR; ++m) acc[m][i] = Op::step(Op::broadcast_last(a + m * lda, s, K), bv, acc[m][i]);
    }
    for (int m = 0; m < MR; ++m) group[m][g] = tree<L>(acc[m]);
  }
  for (int m = 0; m < MR; ++m) {
    V sum = tree<Op::W / L>(group[m]) + V{};
    store(out + m * ldo, first ? sum : read<V>(out + m * ldo) + sum);
  }
}

// How many lanes of MR rows the registers hold: a divisor of W.
template <class Op, int MR>
inline constexpr int lanes_at_once = in_halves<Op> ? (MR == 1 ? 8 : 4) : MR == 1 ? Op::W : MR <= 3 && MAX_ROWS > 1 ? 8 : 4;

template <class Op, int MR = MAX_ROWS, class... Args>
inline void column_rows(int64_t rows, Args... args) {
  if (rows == MR) return column_tile<Op, MR, lanes_at_once<Op, MR>>(args...);
  if constexpr (MR > 1) column_rows<Op, MR - 1>(rows, args...);
}

// out[m * ldo + j] for all m < M and the W columns j of a panel, over the K elements of one block of K.
template <class Op>
void column_block(const typename Op::A* a, int64_t lda, const typename Op::P* b, int64_t ldb, int64_t M, int64_t K,
                  bool first, typename Op::Sum* out, int64_t ldo) {
  int64_t tiles = ceil_div(M, MAX_ROWS);
  for (int64_t i = 0; i < tiles; ++i) {
    int64_t m = M * i / tiles, rows = M * (i + 1) / tiles - m;
    column_rows<Op>(rows, a + m * lda, lda, b, ldb, K, first, out + m * ldo, ldo);
  }
}

}  // namespace bi
