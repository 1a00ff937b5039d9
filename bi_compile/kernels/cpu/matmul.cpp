// mm, addmm, bmm, baddbmm, mm_segments. The order of the sums stands in product.h and amx.h; here is only how the work is divided.
//
// A task is a block of columns by all rows (by 48 rows where there are few columns): the columns of b come from memory once
// and stay in cache while the rows pass by, in blocks of 48. K is never split between tasks.

#include "amx.h"
#include "panel.h"

#include <bit>

namespace bi {
namespace {

constexpr int64_t BLOCK_M = 48;

// Strides in elements; bias is nullptr where it is not read. K is the length of a segment, of which there are `segments`.
struct Problem {
  int64_t batch, M, N, K, segments = 1;
  const void *a, *b, *bias = nullptr;
  int64_t a_batch, a_m;
  int64_t b_batch, b_k, b_n;
  int64_t bias_batch = 0, bias_m = 0, bias_n = 0;
  void* out;
  double alpha = 1, beta = 0;
};

// The tree of adjacent pairs over the segments: `sum(s, to)` writes the `size` sums of segment s to `to`. `blocks` has room for
// blocks_of(segments) blocks of them, of which the first becomes the result.
template <class S, class F>
inline void join_segments(int64_t segments, int64_t size, S* blocks, const F& sum) {
  S* end = blocks;
  for (int64_t s = 0; s < segments; ++s) {
    sum(s, end);
    for (int64_t pairs = s; pairs & 1; pairs >>= 1) {
      end -= size;
      for (int64_t i = 0; i < size; ++i) end[i] += end[i + size];
    }
    end += size;
  }
}

inline int64_t blocks_of(int64_t segments) { return std::bit_width(static_cast<uint64_t>(segments)); }

// Rounds a block of sums into the output, of dtype T: alpha * sum + beta * bias in the accumulator's type.
template <class T>
void store_output(const Problem& p, const Acc<T>* sums, int64_t ld, int64_t batch, int64_t m0, int64_t n0, int64_t rows, int64_t cols) {
  using S = Acc<T>;
  S alpha = static_cast<S>(p.alpha), beta = static_cast<S>(p.beta);
  for (int64_t m = 0; m < rows; ++m) {
    T* out = static_cast<T*>(p.out) + (batch * p.M + m0 + m) * p.N + n0;
    const S* sum = sums + m * ld;
    if (!p.bias) {
      each_vector<LANES<T>>(cols, [&](int64_t n, auto count) {
        auto v = load(sum + n);
        store(out + n, p.alpha == 1 ? v : v * alpha, count);
      });
      continue;
    }
    const T* bias = static_cast<const T*>(p.bias) + batch * p.bias_batch + (m0 + m) * p.bias_m + n0 * p.bias_n;
    for (int64_t n = 0; n < cols; ++n)
      out[n] = static_cast<T>(fma(beta, static_cast<S>(bias[n * p.bias_n]), alpha * sum[n]));
  }
}

// sums = a's `rows` rows times columns n .. n + cols of b, which is contiguous along K.
template <class Op>
struct Dot {
  static constexpr int64_t COLUMNS = 64;
  static void run(const Problem& p, const typename Op::A* a, const typename Op::B* b, int64_t rows, int64_t cols,
                  typename Op::Sum* sums) {
    dot_block<Op>(a, p.a_m, b, p.b_n, rows, cols, p.K, sums, COLUMNS);
  }
};

// The same where b is contiguous along N. A block of K at a time is packed in panels of W columns: read as it lies, with N
// a power of two, the rows of b would drive each other out of the cache.
template <class Op>
struct Column {
  static constexpr int64_t COLUMNS = 64 * Op::PER_STEP;
  static void run(const Problem& p, const typename Op::A* a, const typename Op::B* b, int64_t rows, int64_t cols,
                  typename Op::Sum* sums) {
    using P = typename Op::P;
    struct Panels;
    constexpr int64_t W = Op::W;
    int64_t k = 0;
    do {
      int64_t kn = std::min(BLOCK_K, p.K - k), steps = ceil_div(kn, Op::PER_STEP), count = ceil_div(cols, W);
      int64_t panel = (steps + 3) * W;  // no power of two apart, or the panels would meet in the same lines of the cache
      P* panels = scratch<Panels, P>(count * panel);
      for (int64_t s = 0; s < steps; ++s)
        for (int64_t j = 0; j < count; ++j)
          Op::pack(panels + j * panel + s * W, b + k * p.b_k + j * W, p.b_k, s, kn, cols - j * W);
      for (int64_t j = 0; j < count; ++j)
        column_block<Op>(a + k, p.a_m, panels + j * panel, W, rows, kn, k == 0, sums + j * W, COLUMNS);
      k += kn;
    } while (k < p.K);
  }
};

template <class Op, class T, template <class> class Kernel>
void run_tasks(const Problem& p) {
  constexpr int64_t COLUMNS = Kernel<Op>::COLUMNS;
  int64_t threads = at::get_num_threads();
  // fewer columns to a task where that many would not occupy every thread, but whole panels of them
  int64_t block_n = std::clamp<int64_t>(ceil_div(ceil_div(p.N * p.batch, 2 * threads), 16) * 16, 16, COLUMNS);
  int64_t n_tasks = ceil_div(p.N, block_n), m_blocks = ceil_div(p.M, BLOCK_M);
  int64_t m_tasks = p.batch * n_tasks >= 2 * threads ? 1 : m_blocks;
  int64_t block_m = ceil_div(ceil_div(p.M, m_blocks), MAX_ROWS) * MAX_ROWS;
  int64_t rows_of_task = m_tasks == 1 ? p.M : block_m;
  int64_t cost = std::min(p.M, rows_of_task) * block_n * p.K * p.segments / 8;
  parallel_rows(p.batch * n_tasks * m_tasks, cost, [&](int64_t begin, int64_t end) {
    struct Blocks;
    using Sum = typename Op::Sum;
    Sum* sums = scratch<Blocks, Sum>(blocks_of(p.segments) * BLOCK_M * COLUMNS);
    for (int64_t task = begin; task < end; ++task) {
      int64_t batch = task / (n_tasks * m_tasks), n = task / m_tasks % n_tasks * block_n;
      int64_t m = task % m_tasks * rows_of_task, m_end = std::min(p.M, m + rows_of_task);
      int64_t cols = std::min(block_n, p.N - n);
      auto a = static_cast<const typename Op::A*>(p.a) + batch * p.a_batch;
      auto b = static_cast<const typename Op::B*>(p.b) + batch * p.b_batch + n * p.b_n;
      for (; m < m_end; m += block_m) {
        int64_t rows = std::min(block_m, m_end - m);
        join_segments(p.segments, rows * COLUMNS, sums, [&](int64_t s, Sum* to) {
          Kernel<Op>::run(p, a + m * p.a_m + s * p.K, b + s * p.K * p.b_k, rows, cols, to);
        });
        store_output<T>(p, sums, COLUMNS, batch, m, n, rows, cols);
      }
    }
  });
}

#ifdef __AVX512F__
// Room for packed rows: this thread's scratch memory, unless that would keep more than 16 MB.
struct PackedRows {
  Tensor many;
  float* words;

  explicit PackedRows(int64_t n) {
    if (n <= 4 << 20) {
      words = scratch<PackedRows, float>(n);
    } else {
      many = at::empty({n}, at::kFloat);
      words = many.mutable_data_ptr<float>();
    }
  }
};

// `rows` rows of `words` words are packed so many at a time: as 8 MB hold, but so that packing the other operand again costs little.
int64_t packed_at_once(int64_t rows, int64_t words) {
  int64_t most = std::clamp<int64_t>((2 << 20) / std::max<int64_t>(1, words), 240, 4096);
  return ceil_div(rows, ceil_div(rows, most));
}

// Whether packing is worth its while.
bool worth_panels(const Problem& p) {
  bool occupied = ceil_div(p.N, PANEL_N) >= 2 * at::get_num_threads();
  return p.batch == 1 && p.segments == 1 && p.K > 0 && occupied && p.M >= (p.N >= 2048 ? 56 : 96);
}

// One product, in tasks of 64 columns by all rows.
template <class Op, class T>
void run_panels(const Problem& p, bool along_k) {
  constexpr int64_t PAIR = 2 * MAX_ROWS;
  struct Panel;
  struct Sums;
  auto a = static_cast<const typename Op::A*>(p.a);
  auto b = static_cast<const typename Op::B*>(p.b);
  int64_t k_blocks = ceil_div(p.K, BLOCK_K), steps = ceil_div(std::min(p.K, BLOCK_K), STEP_K<Op>), group = packed_group(steps);
  int64_t most = ceil_div(packed_at_once(p.M, p.K / Op::PER_STEP), PAIR) * PAIR;
  for (int64_t first = 0; first < p.M; first += most) {
    int64_t M = std::min(most, p.M - first), pairs = ceil_div(M, PAIR), groups = ceil_div(M, GROUP_ROWS);
    PackedRows rows(k_blocks * groups * group);
    parallel_rows(k_blocks * pairs, PAIR * BLOCK_K / 8, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        int64_t m = i % pairs * PAIR, block = i / pairs, k = block * BLOCK_K;
        pack_panel_rows<Op>(rows.words + (block * groups + m / GROUP_ROWS) * group, a + first * p.a_m + k, p.a_m, m, M, std::min(BLOCK_K, p.K - k));
      }
    });
    parallel_rows(ceil_div(p.N, PANEL_N), M * PANEL_N * p.K / 8, [&](int64_t begin, int64_t end) {
      float* panel = scratch<Panel, float>(packed_columns(steps));
      float* sums = scratch<Sums, float>(M * PANEL_N);
      for (int64_t n = begin * PANEL_N; n < std::min(p.N, end * PANEL_N); n += PANEL_N) {
        int64_t cols = std::min(PANEL_N, p.N - n);
        for (int64_t k = 0; k < p.K; k += BLOCK_K) {
          int64_t kn = std::min(BLOCK_K, p.K - k);
          pack_panel_columns<Op>(panel, b + n * p.b_n + k * p.b_k, along_k, along_k ? p.b_n : p.b_k, cols, kn);
          panel_block<Op>(rows.words + k / BLOCK_K * groups * group, group, panel, M, kn, k == 0, sums, [&](int64_t m, int64_t count) {
            if (k + kn == p.K) store_output<T>(p, sums + m * PANEL_N, PANEL_N, 0, first + m, n, count, cols);
          });
        }
      }
    });
  }
}
#endif

#ifdef BI_AMX
// bfloat16 on tiles: up to 128 columns to a task, by all rows or by 32. The rows pass by in pairs of tiles, and each pair stays in
// the cache while all columns of the task take it.
template <class T>
void run_amx(const Problem& p, bool along_k) {
  constexpr int64_t PAIR = 2 * TILE, MOST_PAIRS = 4;
  struct Panel;
  auto a = static_cast<const BFloat16*>(p.a), b = static_cast<const BFloat16*>(p.b);
  int64_t steps = ceil_div(p.K, TILE_K), threads = at::get_num_threads();
  int64_t block_n = std::clamp<int64_t>(ceil_div(p.N * p.batch, PAIR) / (2 * threads), 1, MOST_PAIRS) * PAIR, n_tasks = ceil_div(p.N, block_n);
  int64_t most = ceil_div(packed_at_once(p.M, p.batch * p.K * p.segments / 2), PAIR) * PAIR;
  for (int64_t first = 0; first < p.M; first += most) {
    int64_t M = std::min(most, p.M - first), blocks = ceil_div(M, TILE);
    PackedRows packed(along_k ? p.batch * p.segments * blocks * steps * BLOCK : 0);  // if they are the right operand
    auto rows = reinterpret_cast<uint32_t*>(packed.words);
    if (along_k) {
      parallel_rows(p.batch * p.segments * blocks, TILE * p.K / 8, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          int64_t m = i % blocks * TILE, batch = i / (blocks * p.segments), s = i / blocks % p.segments;
          auto x = a + batch * p.a_batch + s * p.K + (first + m) * p.a_m;
          pack_rows(rows + i * steps * BLOCK, x, p.a_m, std::min(TILE, M - m), p.K);
        }
      });
    }
    int64_t pairs = ceil_div(M, PAIR), m_tasks = p.batch * n_tasks >= 2 * threads ? 1 : pairs, each = m_tasks == 1 ? blocks * TILE : PAIR;
    parallel_rows(p.batch * n_tasks * m_tasks, each * block_n * p.K * p.segments / 64, [&](int64_t begin, int64_t end) {
      TileConfig config;
      struct Tiles;
      float* tiles = scratch<Tiles, float>(blocks_of(p.segments) * 4 * BLOCK);
      alignas(64) float sums[PAIR * PAIR];
      for (int64_t task = begin; task < end; ++task) {
        int64_t batch = task / (n_tasks * m_tasks), n0 = task / m_tasks % n_tasks * block_n, n_end = std::min(p.N, n0 + block_n);
        int64_t all_blocks = ceil_div(n_end - n0, TILE), from = task % m_tasks * each;
        Rows left[2] = {};
        auto read_left = [&](const BFloat16* x, int64_t ld, int64_t count) {
          left[0] = left_rows<0>(x, ld, std::min(TILE, count), p.K);
          if (count > TILE) left[1] = left_rows<1>(x + TILE * ld, ld, count - TILE, p.K);
        };
        const uint32_t* right[2] = {};
        uint32_t* panel = nullptr;  // of `b`, packed, if it is the right operand
        if (!along_k) {
          panel = scratch<Panel, uint32_t>(p.segments * all_blocks * steps * BLOCK);
          for (int64_t s = 0; s < p.segments; ++s)
            pack_columns(panel + s * all_blocks * steps * BLOCK, steps * BLOCK, b + batch * p.b_batch + s * p.K * p.b_k + n0 * p.b_n, p.b_k, n_end - n0, p.K);
        }
        for (int64_t m = from; m < std::min(M, from + each); m += PAIR)
          for (int64_t n = n0; n < n_end; n += PAIR) {
            int64_t count = std::min(PAIR, M - m), m_blocks = ceil_div(count, TILE);
            int64_t cols = std::min(PAIR, n_end - n), n_blocks = ceil_div(cols, TILE);
            join_segments(p.segments, m_blocks * n_blocks * BLOCK, tiles, [&](int64_t s, float* to) {
              if (along_k) {
                for (int64_t j = 0; j < m_blocks; ++j) right[j] = rows + (((batch * p.segments + s) * blocks) + m / TILE + j) * steps * BLOCK;
                read_left(b + batch * p.b_batch + n * p.b_n + s * p.K, p.b_n, cols);
                tile_product(n_blocks, m_blocks, left, right, p.K, m == from, to);
              } else {
                for (int64_t j = 0; j < n_blocks; ++j) right[j] = panel + (s * all_blocks + (n - n0) / TILE + j) * steps * BLOCK;
                read_left(a + batch * p.a_batch + s * p.K + (first + m) * p.a_m, p.a_m, count);
                tile_product(m_blocks, n_blocks, left, right, p.K, false, to);
              }
            });
            for (int64_t i = 0; i < m_blocks; ++i)
              for (int64_t j = 0; j < n_blocks; ++j)
                store_tile(tiles + (along_k ? j * m_blocks + i : i * n_blocks + j) * BLOCK, along_k, sums + i * TILE * PAIR + j * TILE, PAIR);
            store_output<T>(p, sums, PAIR, batch, first + m, n, count, cols);
          }
      }
    });
  }
}
#endif

// ---- the operators ----

void check(const char* op, int64_t dims, const Tensor& a, const Tensor& b, const OptTensor& bias) {
  TORCH_CHECK(a.dim() == dims && b.dim() == dims, "bi_compile::", op, " takes ", dims, "-D operands, got ", a.dim(), "-D and ", b.dim(), "-D");
  TORCH_CHECK(a.scalar_type() == b.scalar_type() && (!bias || bias->scalar_type() == a.scalar_type()), "bi_compile::", op,
              " takes operands of one dtype, got ", a.scalar_type(), ", ", b.scalar_type(), bias ? ", bias " : "",
              bias ? c10::toString(bias->scalar_type()) : "", ": cast them first");
  check_float(op, a.scalar_type());
  TORCH_CHECK(a.size(-1) == b.size(-2), "bi_compile::", op, " cannot multiply ", a.sizes(), " by ", b.sizes());
  TORCH_CHECK(dims == 2 || a.size(0) == b.size(0), "bi_compile::", op, " cannot multiply ", a.sizes(), " by ", b.sizes());
}

// bias's strides as one of `sizes`, which it broadcasts to.
void set_bias(const char* op, Problem& p, const Tensor& bias, at::IntArrayRef sizes) {
  int64_t missing = static_cast<int64_t>(sizes.size()) - bias.dim();
  bool fits = missing >= 0;
  int64_t strides[3] = {0, 0, 0};
  for (int64_t i = 0; fits && i < bias.dim(); ++i) {
    fits = bias.size(i) == sizes[missing + i] || bias.size(i) == 1;
    strides[3 - bias.dim() + i] = bias.size(i) == 1 ? 0 : bias.stride(i);
  }
  TORCH_CHECK(fits, "bi_compile::", op, ": a bias of ", bias.sizes(), " does not broadcast to ", sizes);
  p.bias = bias.const_data_ptr();
  p.bias_batch = strides[0], p.bias_m = strides[1], p.bias_n = strides[2];
}

bool contiguous_along(const Tensor& t, int64_t dim) { return t.stride(dim) == 1 || t.size(dim) <= 1; }

// The operands as the kernels read them, and their sizes and strides.
struct Operands {
  Tensor a, b;
  Problem p;

  Operands(const Tensor& a_, const Tensor& b_) : a(a_), b(b_) {
    ScalarType type = a.scalar_type();
    bool wide_a = type == at::kHalf;
#ifndef __AVX512BF16__
    wide_a = wide_a || type == at::kBFloat16;
#endif
    if (wide_a) a = a.to(at::kFloat);
    if (!contiguous_along(a, -1)) a = a.contiguous();
    if (!contiguous_along(b, -2) && !contiguous_along(b, -1)) b = b.transpose(-1, -2).contiguous().transpose(-1, -2);
    bool batched = a.dim() == 3;
    p.batch = batched ? a.size(0) : 1, p.M = a.size(-2), p.N = b.size(-1), p.K = a.size(-1);
    p.a = a.const_data_ptr(), p.b = b.const_data_ptr();
    p.a_batch = batched ? a.stride(0) : 0, p.a_m = a.stride(-2);
    p.b_batch = batched ? b.stride(0) : 0, p.b_k = b.stride(-2), p.b_n = b.stride(-1);
  }

  // Fills p.out, which is of the operands' dtype, or (wide) of their accumulator's.
  void run(bool wide = false) const {
    bool along_k = contiguous_along(b, -2);
#ifdef BI_AMX
    if (b.scalar_type() == at::kBFloat16 && amx_permitted()) return wide ? run_amx<float>(p, along_k) : run_amx<BFloat16>(p, along_k);
#endif
    with_type(b.scalar_type(), [&](auto t) {
      using T = decltype(t);
      auto into = [&](auto o) {
        using Out = decltype(o);
        using Op = Step<T>;
#ifdef __AVX512F__
        if constexpr (in_panels<Op>) {
          if (worth_panels(p)) return run_panels<Op, Out>(p, along_k);
        }
#endif
        along_k ? run_tasks<Op, Out, Dot>(p) : run_tasks<Op, Out, Column>(p);
      };
      wide ? into(Acc<T>{}) : into(T{});
    });
  }
};

Tensor product(const char* op, int64_t dims, const Tensor& a, const Tensor& b, const OptTensor& bias = {}, double alpha = 1, double beta = 0) {
  check(op, dims, a, b, bias);
  Operands x(a, b);
  Problem& p = x.p;
  int64_t sizes[3] = {p.batch, p.M, p.N};
  at::IntArrayRef shape(sizes + 3 - dims, dims);
  p.alpha = alpha, p.beta = beta;
  if (bias) set_bias(op, p, *bias, shape);
  if (beta == 0) p.bias = nullptr;
  Tensor out = at::empty(shape, a.options().memory_format(at::MemoryFormat::Contiguous));
  if (out.numel() == 0) return out;
  p.out = out.mutable_data_ptr();
  x.run();
  return out;
}

Tensor mm_segments(const Tensor& a, const Tensor& b, int64_t segments) {
  check("mm_segments", 2, a, b, {});
  TORCH_CHECK(segments > 0 && (segments & (segments - 1)) == 0 && a.size(1) % segments == 0, "bi_compile::mm_segments: K = ", a.size(1),
              " does not divide into ", segments, " segments, or that is no power of two");
  Operands x(a, b);
  Tensor out = at::empty({x.p.M, x.p.N}, a.options().dtype(statistic(a)).memory_format(at::MemoryFormat::Contiguous));
  if (out.numel() == 0) return out;
  x.p.segments = segments, x.p.K /= segments;
  x.p.out = out.mutable_data_ptr();
  x.run(/*wide=*/true);
  return out;
}

Tensor mm(const Tensor& a, const Tensor& b) { return product("mm", 2, a, b); }
Tensor bmm(const Tensor& a, const Tensor& b) { return product("bmm", 3, a, b); }
Tensor addmm(const Tensor& bias, const Tensor& a, const Tensor& b, const at::Scalar& beta, const at::Scalar& alpha) {
  return product("addmm", 2, a, b, bias, alpha.toDouble(), beta.toDouble());
}
Tensor baddbmm(const Tensor& bias, const Tensor& a, const Tensor& b, const at::Scalar& beta, const at::Scalar& alpha) {
  return product("baddbmm", 3, a, b, bias, alpha.toDouble(), beta.toDouble());
}

}  // namespace

TORCH_LIBRARY_IMPL(bi_compile, CPU, m) {
  m.impl("mm", mm);
  m.impl("addmm", addmm);
  m.impl("bmm", bmm);
  m.impl("baddbmm", baddbmm);
  m.impl("mm_segments", mm_segments);
}

}  // namespace bi
