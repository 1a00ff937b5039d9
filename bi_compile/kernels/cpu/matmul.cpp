// mm, addmm, bmm, baddbmm. The order of the sums stands in product.h and amx.h; here is only how the work is divided.
//
// A task is a block of columns by all rows (by 48 rows where there are few columns): the columns of b come from memory once
// and stay in cache while the rows pass by, in blocks of 48. K is never split between tasks.

#include "amx.h"

namespace bi {
namespace {

constexpr int64_t BLOCK_M = 48;

// Strides in elements; bias is nullptr where it is not read.
struct Problem {
  int64_t batch, M, N, K;
  const void *a, *b, *bias = nullptr;
  int64_t a_batch, a_m;
  int64_t b_batch, b_k, b_n;
  int64_t bias_batch = 0, bias_m = 0, bias_n = 0;
  void* out;
  double alpha = 1, beta = 0;
};

// Rounds a block of sums into the output: alpha * sum + beta * bias in the accumulator's type.
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
  int64_t cost = std::min(p.M, rows_of_task) * block_n * p.K / 8;
  parallel_rows(p.batch * n_tasks * m_tasks, cost, [&](int64_t begin, int64_t end) {
    alignas(64) typename Op::Sum sums[BLOCK_M * COLUMNS];
    for (int64_t task = begin; task < end; ++task) {
      int64_t batch = task / (n_tasks * m_tasks), n = task / m_tasks % n_tasks * block_n;
      int64_t m = task % m_tasks * rows_of_task, m_end = std::min(p.M, m + rows_of_task);
      int64_t cols = std::min(block_n, p.N - n);
      auto a = static_cast<const typename Op::A*>(p.a) + batch * p.a_batch;
      auto b = static_cast<const typename Op::B*>(p.b) + batch * p.b_batch + n * p.b_n;
      for (; m < m_end; m += block_m) {
        int64_t rows = std::min(block_m, m_end - m);
        Kernel<Op>::run(p, a + m * p.a_m, b, rows, cols, sums);
        store_output<T>(p, sums, COLUMNS, batch, m, n, rows, cols);
      }
    }
  });
}

#ifdef BI_AMX
// Rows of `a` that are packed at a time.
constexpr int64_t MOST_PACKED = 2048;

// bfloat16 on tiles: 32 columns to a task, by all rows or by 32.
void run_amx(const Problem& p, bool along_k) {
  constexpr int64_t PAIR = 2 * TILE;
  struct Packed;
  auto a = static_cast<const BFloat16*>(p.a), b = static_cast<const BFloat16*>(p.b);
  int64_t steps = ceil_div(p.K, TILE_K), threads = at::get_num_threads(), n_tasks = ceil_div(p.N, PAIR);
  for (int64_t first = 0; first < p.M; first += MOST_PACKED) {
    int64_t M = std::min(MOST_PACKED, p.M - first), blocks = ceil_div(M, TILE);
    Tensor rows;  // of `a`, packed, if they are the right operand
    if (along_k) {
      rows = at::empty({p.batch * blocks * steps * BLOCK}, at::kInt);
      parallel_rows(p.batch * blocks, TILE * p.K / 8, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          int64_t m = i % blocks * TILE;
          auto x = a + i / blocks * p.a_batch + (first + m) * p.a_m;
          pack_rows(reinterpret_cast<uint32_t*>(rows.mutable_data_ptr<int>()) + i * steps * BLOCK, x, p.a_m, std::min(TILE, M - m), p.K);
        }
      });
    }
    int64_t pairs = ceil_div(M, PAIR), m_tasks = p.batch * n_tasks >= 2 * threads ? 1 : pairs, each = m_tasks == 1 ? blocks * TILE : PAIR;
    parallel_rows(p.batch * n_tasks * m_tasks, each * PAIR * p.K / 64, [&](int64_t begin, int64_t end) {
      TileConfig config;
      alignas(64) float tiles[4 * BLOCK], sums[PAIR * PAIR];
      for (int64_t task = begin; task < end; ++task) {
        int64_t batch = task / (n_tasks * m_tasks), n = task / m_tasks % n_tasks * PAIR, cols = std::min(PAIR, p.N - n);
        int64_t n_blocks = ceil_div(cols, TILE), from = task % m_tasks * each;
        auto weights = b + batch * p.b_batch + n * p.b_n;
        Rows left[2] = {};
        auto read_left = [&](const BFloat16* x, int64_t ld, int64_t count) {
          left[0] = left_rows<0>(x, ld, std::min(TILE, count), p.K);
          if (count > TILE) left[1] = left_rows<1>(x + TILE * ld, ld, count - TILE, p.K);
        };
        const uint32_t* right[2] = {};
        if (along_k) {
          read_left(weights, p.b_n, cols);
        } else {
          uint32_t* panel = scratch<Packed, uint32_t>(n_blocks * steps * BLOCK);
          for (int64_t j = 0; j < n_blocks; ++j) {
            right[j] = panel + j * steps * BLOCK;
            pack_columns(panel + j * steps * BLOCK, weights + j * TILE, p.b_k, cols - j * TILE, p.K);
          }
        }
        for (int64_t m = from; m < std::min(M, from + each); m += PAIR) {
          int64_t count = std::min(PAIR, M - m), m_blocks = ceil_div(count, TILE);
          if (along_k) {
            auto packed = reinterpret_cast<const uint32_t*>(rows.const_data_ptr<int>()) + batch * blocks * steps * BLOCK;
            for (int64_t j = 0; j < m_blocks; ++j) right[j] = packed + (m / TILE + j) * steps * BLOCK;
            tile_product(n_blocks, m_blocks, left, right, p.K, m == from, tiles);
          } else {
            read_left(a + batch * p.a_batch + (first + m) * p.a_m, p.a_m, count);
            tile_product(m_blocks, n_blocks, left, right, p.K, false, tiles);
          }
          for (int64_t i = 0; i < m_blocks; ++i)
            for (int64_t j = 0; j < n_blocks; ++j)
              store_tile(tiles + (along_k ? j * m_blocks + i : i * n_blocks + j) * BLOCK, along_k, sums + i * TILE * PAIR + j * TILE, PAIR);
          store_output<BFloat16>(p, sums, PAIR, batch, first + m, n, count, cols);
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

Tensor product(const char* op, int64_t dims, const Tensor& a_, const Tensor& b_, const OptTensor& bias = {}, double alpha = 1, double beta = 0) {
  check(op, dims, a_, b_, bias);
  ScalarType type = a_.scalar_type();
  bool wide_a = type == at::kHalf;
#ifndef __AVX512BF16__
  wide_a = wide_a || type == at::kBFloat16;
#endif
  Tensor a = wide_a ? a_.to(at::kFloat) : a_, b = b_;
  if (!contiguous_along(a, -1)) a = a.contiguous();
  if (!contiguous_along(b, -2) && !contiguous_along(b, -1)) b = b.transpose(-1, -2).contiguous().transpose(-1, -2);
  Problem p;
  int64_t sizes[3] = {dims == 3 ? a.size(0) : 1, a.size(-2), b.size(-1)};
  at::IntArrayRef shape(sizes + 3 - dims, dims);
  p.batch = sizes[0], p.M = sizes[1], p.N = sizes[2], p.K = a.size(-1);
  p.alpha = alpha, p.beta = beta;
  p.a = a.const_data_ptr(), p.b = b.const_data_ptr();
  p.a_batch = dims == 3 ? a.stride(0) : 0, p.a_m = a.stride(-2);
  p.b_batch = dims == 3 ? b.stride(0) : 0, p.b_k = b.stride(-2), p.b_n = b.stride(-1);
  if (bias) set_bias(op, p, *bias, shape);
  if (beta == 0) p.bias = nullptr;
  Tensor out = at::empty(shape, a_.options().memory_format(at::MemoryFormat::Contiguous));
  if (out.numel() == 0) return out;
  p.out = out.mutable_data_ptr();
#ifdef BI_AMX
  if (type == at::kBFloat16 && amx_permitted()) {
    run_amx(p, contiguous_along(b, -2));
    return out;
  }
#endif
  with_type(type, [&](auto t) {
    using T = decltype(t);
    contiguous_along(b, -2) ? run_tasks<Step<T>, T, Dot>(p) : run_tasks<Step<T>, T, Column>(p);
  });
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
}

}  // namespace bi
