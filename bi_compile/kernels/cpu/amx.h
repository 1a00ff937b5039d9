// bfloat16 products on AMX, where the processor has it and the system permits it.
//
// The order of the sum: K in steps of 32, ascending. A step has two partial sums, of the even and of the odd elements, each 16
// fused multiply-adds from +0, ascending; their sum is added to the element. Subnormals count as zeros. Missing elements are
// zeros, which change nothing. It is the instruction's own order (tdpbf16ps in Intel's manual), the same for every tile.
//
// A tile is 16 x 16 results. Its left operand, 16 rows along K, is read where it lies; its right one is packed: for each pair of
// elements of K the 16 columns' pairs side by side. The weights are never packed as a whole: with b contiguous along K they are
// the left operand and the result is transposed, else a panel of 32 columns is packed that stays in the cache.
#pragma once

#include "product.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#define BI_AMX

namespace bi {

inline constexpr int64_t TILE = 16;
inline constexpr int64_t TILE_K = 32;
inline constexpr int64_t BLOCK = TILE * TILE;  // 32-bit words of a packed step, and results of a tile

// Whether tiles may be used in this process.
inline bool amx_permitted() {
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool permitted = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  return permitted;
}

// This thread's tiles, eight of 16 rows of 64 bytes, as long as it lives.
struct TileConfig {
  TileConfig() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~TileConfig() { _tile_release(); }
};

// `count` <= 32 elements, zeros behind them.
inline __m512i elements(const BFloat16* p, int64_t count) {
  return (__m512i)DotBf16::a_part(p, count);
}

// Packs `rows` <= 16 rows along K, `ld` apart, as columns of a right operand: ceil(k / 32) blocks.
inline void pack_rows(uint32_t* to, const BFloat16* x, int64_t ld, int64_t rows, int64_t k) {
  for (int64_t at = 0; at < k; at += TILE_K, to += BLOCK) {
    __m512i words[TILE];
    lanes_of(words, x + at, ld, rows, std::min(TILE_K, k - at), elements);
    for (int64_t i = 0; i < TILE; ++i) _mm512_storeu_si512(to + i * TILE, words[i]);
  }
}

// Packs `cols` columns of a matrix contiguous along N, its rows `ld` apart, 16 of them to an operand; the operands lie `apart` words apart.
inline void pack_columns(uint32_t* to, int64_t apart, const BFloat16* x, int64_t ld, int64_t cols, int64_t k) {
  int64_t pairs = ceil_div(k, TILE_K) * TILE;
  for (int64_t s = 0; s < pairs; ++s)
    for (int64_t n = 0; n < cols; n += TILE) {
      uint32_t* words = to + n / TILE * apart + s * TILE;
      2 * s < k ? DotBf16::pack(words, x + n, ld, s, k, cols - n) : void(std::memset(words, 0, TILE * sizeof *words));
    }
}

// 16 rows along K of a left operand: where they lie, or copied if they are fewer, zeros for the others.
struct Rows {
  const BFloat16 *whole, *last;  // last: the step that is not whole, filled with zeros, 16 x 32
  int64_t ld;
};

// The rows from x, of which there are `count`; `slot` tells apart what is held at the same time.
template <int slot>
inline Rows left_rows(const BFloat16* x, int64_t ld, int64_t count, int64_t k) {
  struct Panel;
  struct Last;
  int64_t full = k / TILE_K * TILE_K, rest = k - full;
  const BFloat16* from = x;
  int64_t apart = ld;
  if (count < TILE) {
    BFloat16* panel = scratch<Panel, BFloat16>(TILE * std::max(full, TILE_K));
    for (int64_t i = 0; i < TILE; ++i)
      for (int64_t at = 0; at < full; at += TILE_K)
        _mm512_storeu_si512(panel + i * full + at, i < count ? elements(x + i * ld + at, TILE_K) : __m512i{});
    from = panel, apart = full;
  }
  BFloat16* last = nullptr;
  if (rest) {
    last = scratch<Last, BFloat16>(TILE * TILE_K);
    for (int64_t i = 0; i < TILE; ++i)
      _mm512_storeu_si512(last + i * TILE_K, i < count ? elements(x + i * ld + full, rest) : __m512i{});
  }
  return {from, last, apart};
}

// out: R x C tiles of results, row by row; `right`: a packed operand for each column of tiles; `prefetch`: the rows come from memory.
template <int R, int C>
void tile_product(const Rows (&left)[2], const uint32_t* const (&right)[2], int64_t k, bool prefetch, float* out) {
  constexpr int64_t FETCH = 8 * TILE_K;
  int64_t full = k / TILE_K;
  _tile_zero(0);
  if constexpr (C == 2) _tile_zero(1);
  if constexpr (R == 2) _tile_zero(2);
  if constexpr (R * C == 4) _tile_zero(3);
  auto step = [&](const BFloat16* x0, int64_t ld0, const BFloat16* x1, int64_t ld1, int64_t s) {
    _tile_loadd(4, x0, ld0 * sizeof(BFloat16));
    _tile_loadd(6, right[0] + s * BLOCK, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (C == 2) {
      _tile_loadd(7, right[1] + s * BLOCK, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (R == 2) {
      _tile_loadd(5, x1, ld1 * sizeof(BFloat16));
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (C == 2) _tile_dpbf16ps(3, 5, 7);
    }
  };
  for (int64_t s = 0; s < full; ++s) {
    const BFloat16 *x0 = left[0].whole + s * TILE_K, *x1 = left[1].whole + s * TILE_K;
    if (prefetch)
      for (int64_t i = 0; i < TILE; ++i) {
        __builtin_prefetch(x0 + i * left[0].ld + FETCH, 0, 2);
        if constexpr (R == 2) __builtin_prefetch(x1 + i * left[1].ld + FETCH, 0, 2);
      }
    step(x0, left[0].ld, x1, left[1].ld, s);
  }
  if (k % TILE_K) step(left[0].last, TILE_K, left[1].last, TILE_K, full);
  _tile_stored(0, out, 64);
  if constexpr (C == 2) _tile_stored(1, out + BLOCK, 64);
  if constexpr (R == 2) _tile_stored(2, out + C * BLOCK, 64);
  if constexpr (R * C == 4) _tile_stored(3, out + 3 * BLOCK, 64);
}

inline void tile_product(int64_t rows, int64_t cols, const Rows (&left)[2], const uint32_t* const (&right)[2], int64_t k, bool prefetch,
                         float* out) {
  if (rows == 2) return cols == 2 ? tile_product<2, 2>(left, right, k, prefetch, out) : tile_product<2, 1>(left, right, k, prefetch, out);
  return cols == 2 ? tile_product<1, 2>(left, right, k, prefetch, out) : tile_product<1, 1>(left, right, k, prefetch, out);
}

// Writes a tile to a matrix whose rows are `ld` apart, transposed or not.
inline void store_tile(const float* tile, bool transposed, float* to, int64_t ld) {
  __m512i words[TILE];
  for (int i = 0; i < TILE; ++i) words[i] = _mm512_loadu_si512(tile + i * TILE);
  if (transposed) transpose(words);
  for (int i = 0; i < TILE; ++i) _mm512_storeu_si512(to + i * ld, words[i]);
}

}  // namespace bi
#endif
