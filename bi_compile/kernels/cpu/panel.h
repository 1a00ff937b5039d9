// The product of many rows, with the bits of product.h's kernels, where a sum's partial sums are floats in registers of 64 bytes.
//
// The operands are packed lane by lane: of a block of K, what lane j takes of six rows, or of 64 columns, lies together, one step behind
// the other. A tile is one lane of 6 x 64 elements. What it reads of b, 16 KB, stays in the first-level cache while rows pass by; the dot
// kernel, in which all lanes pass at once, asks the caches for three times as much. A tile joins its lane to those before it, in the order of
// the tree of adjacent pairs.
#pragma once

#include "product.h"

#include <bit>

#ifdef __AVX512F__

namespace bi {

inline constexpr int64_t PANEL_N = 64;
inline constexpr int64_t PANEL_VECTORS = PANEL_N / 16;
inline constexpr int64_t TILE_LANES = MAX_ROWS * PANEL_VECTORS;  // vectors of partial sums in a tile
inline constexpr int64_t PENDING = 5;                            // tiles of sums that wait for their pair, at most
inline constexpr int64_t GROUP_ROWS = 8 * MAX_ROWS;              // rows that pass by a lane of b
inline constexpr int64_t GAP = 16;                               // words between packed lanes, or all would meet in the same lines of the cache

// A word is what a lane takes in a step: a float, or two bfloat16.
template <class Op>
inline constexpr bool in_panels = std::is_same_v<typename Op::V, f32x16>;
template <class Op>
inline constexpr int64_t STEP_K = Op::W * Op::PER_STEP;

// Words of a group of rows and of 64 columns, both packed, of a block of K of so many steps.
inline int64_t packed_group(int64_t steps) { return 16 * (GROUP_ROWS * steps + GAP); }
inline int64_t packed_columns(int64_t steps) { return 16 * (PANEL_N * steps + GAP); }

// Tiles of the group of rows that begins with row `from` of M: of packed rows an even number.
inline int64_t tiles_of_group(int64_t from, int64_t M) { return 2 * ceil_div(std::min(GROUP_ROWS, M - from), 2 * MAX_ROWS); }

// Twelve rows from row m of the M rows of `a`, over a block of K: `to` is their group, [lane][tile][step][6], read from front to back.
template <class Op>
void pack_panel_rows(float* to, const typename Op::A* a, int64_t lda, int64_t m, int64_t M, int64_t k) {
  constexpr int FIRST = (1 << MAX_ROWS) - 1;
  int64_t steps = ceil_div(k, STEP_K<Op>), from = m / GROUP_ROWS * GROUP_ROWS, tiles = tiles_of_group(from, M), tile = (m - from) / MAX_ROWS;
  __m512i words[16];
  for (int64_t s = 0; s < steps; ++s) {
    lanes_of(words, a + m * lda + s * STEP_K<Op>, lda, std::min<int64_t>(2 * MAX_ROWS, M - m), std::min(STEP_K<Op>, k - s * STEP_K<Op>), Op::a_part);
    for (int64_t j = 0; j < 16; ++j) {
      float* lane = to + j * (tiles * steps * MAX_ROWS + GAP) + (tile * steps + s) * MAX_ROWS;
      _mm512_mask_storeu_epi32(lane, FIRST, words[j]);
      _mm512_mask_storeu_epi32(lane + (steps - 1) * MAX_ROWS, FIRST << MAX_ROWS, words[j]);
    }
  }
}

// Up to 64 columns of a block of K: [lane][step][64]. ld: between the columns, which are contiguous along K, or between the rows of columns
// contiguous along N.
template <class Op>
void pack_panel_columns(float* to, const typename Op::B* b, bool along_k, int64_t ld, int64_t cols, int64_t k) {
  int64_t steps = ceil_div(k, STEP_K<Op>), apart = steps * PANEL_N + GAP;
  for (int64_t n = 0; n < PANEL_N; n += 16)
    for (int64_t s = 0; s < steps; ++s) {
      float* lane = to + s * PANEL_N + n;
      if (along_k) {
        __m512i words[16];
        lanes_of(words, b + n * ld + s * STEP_K<Op>, ld, cols - n, std::min(STEP_K<Op>, k - s * STEP_K<Op>), Op::b_part);
        for (int64_t j = 0; j < 16; ++j) _mm512_storeu_si512(lane + j * apart, words[j]);
        continue;
      }
      for (int64_t j = 0; j < 16; ++j) {
        typename Op::P word[16];
        f32x16 v = {};
        if ((s * 16 + j) * Op::PER_STEP < k && n < cols) Op::pack(word, b + n, ld, s * 16 + j, k, cols - n), v = (f32x16)Op::row(word);
        store(lane + j * apart, v);
      }
    }
}

// A lane of MR x 64 elements, added to the last PAIRS of the sums before `end` one after the other, and written in their place.
template <class Op, int MR, int PAIRS>
void panel_tile(const float* a, const float* b, int64_t steps, f32x16* end) {
  using V = f32x16;
  V acc[MR][PANEL_VECTORS] = {};
  for (int64_t s = 0; s < steps; ++s) {
    V bv[PANEL_VECTORS];
    for (int n = 0; n < PANEL_VECTORS; ++n) bv[n] = load(b + s * PANEL_N + n * 16);
    for (int m = 0; m < MR; ++m) {
      V av = (V)_mm512_set1_ps(a[s * MAX_ROWS + m]);
      keep_in_register(av);
      for (int n = 0; n < PANEL_VECTORS; ++n) acc[m][n] = Op::step(av, bv[n], acc[m][n]);
    }
  }
  // unrolled early, or GCC writes the tile to the stack
#pragma GCC unroll 6
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < PANEL_VECTORS; ++n) {
      V sum = acc[m][n];
      for (int pair = 1; pair <= PAIRS; ++pair) sum = end[m * PANEL_VECTORS + n - pair * TILE_LANES] + sum;
      end[m * PANEL_VECTORS + n - PAIRS * TILE_LANES] = sum;
    }
}

// Lane `lane` of `rows` x 64 elements; pending: the sums of the lanes before it, of which every pair has been joined.
template <class Op, int MR = MAX_ROWS>
void panel_lane(int64_t rows, const float* a, const float* b, int64_t steps, int64_t lane, f32x16* pending) {
  if (rows < MR) {
    if constexpr (MR > 1) panel_lane<Op, MR - 1>(rows, a, b, steps, lane, pending);
    return;
  }
  f32x16* end = pending + std::popcount(static_cast<uint64_t>(lane)) * TILE_LANES;
  switch (std::countr_one(static_cast<uint64_t>(lane))) {
    case 0: return panel_tile<Op, MR, 0>(a, b, steps, end);
    case 1: return panel_tile<Op, MR, 1>(a, b, steps, end);
    case 2: return panel_tile<Op, MR, 2>(a, b, steps, end);
    case 3: return panel_tile<Op, MR, 3>(a, b, steps, end);
    default: return panel_tile<Op, MR, 4>(a, b, steps, end);
  }
}

// sums[m * 64 + n] of M rows over k elements, a block of K. a: the rows as packed, their groups `apart` words apart; b: the columns as packed;
// `first`: sums are set, else added to. done(m, count): what follows when `count` rows from m have their sums, which are still in the cache.
template <class Op, class F>
void panel_block(const float* a, int64_t apart, const float* b, int64_t M, int64_t k, bool first, float* sums, const F& done) {
  struct Pending;
  f32x16* all_pending = scratch<Pending, f32x16>(GROUP_ROWS / MAX_ROWS * PENDING * TILE_LANES);
  int64_t steps = ceil_div(k, STEP_K<Op>);
  for (int64_t from = 0; from < M; from += GROUP_ROWS) {
    int64_t end = std::min(M, from + GROUP_ROWS), tiles = tiles_of_group(from, M);
    const float* group = a + from / GROUP_ROWS * apart;
    for (int64_t lane = 0; lane < 16; ++lane)
      for (int64_t m = from; m < end; m += MAX_ROWS) {
        int64_t tile = (m - from) / MAX_ROWS, rows = std::min<int64_t>(MAX_ROWS, end - m);
        f32x16* pending = all_pending + tile * PENDING * TILE_LANES;
        panel_lane<Op>(rows, group + lane * (tiles * steps * MAX_ROWS + GAP) + tile * steps * MAX_ROWS, b + lane * (steps * PANEL_N + GAP), steps, lane,
                       pending);
        if (lane < 15) continue;
        for (int64_t i = 0; i < rows * PANEL_VECTORS; ++i) {
          float* to = sums + m * PANEL_N + i * 16;
          f32x16 sum = pending[i] + 0.f;
          store(to, first ? sum : load(to) + sum);
        }
        done(m, rows);
      }
  }
}

}  // namespace bi
#endif
