// scaled_dot_product_attention, a block of query rows of one head at a time.
//
// For each row: scores by the product's rule (product.h) times `scale` in float32, plus the mask; their exact maximum; the
// exp of the differences in float32; its sum in double over the lanes s mod 16, ascending, and the tree; the sum of
// p * v over s in float32 by the product's rule (element s belongs to lane s mod 16; bfloat16 values are widened); that
// times 1 / sum, in double, rounded to float32 and then to the dtype. float64: everything in double.
//
// A key is masked where is_causal or a bool mask excludes it or a float mask is -inf, whatever its score: it is given the
// score -inf and the probability 0. A key of probability 0 adds nothing, whatever its value row holds (inf and NaN too).
// So keys behind the last seen one do not matter, nor which other rows are computed at the same time.

#include "attention.h"

namespace bi {
namespace {

struct Attention {
  int64_t B, Hq, Hkv, L, S, D, Dv;
  Tensor q, k, v;
  OptTensor mask;
  int64_t mask_stride[4] = {0, 0, 0, 0};
  bool causal;
  double scale;
};

// Adds the mask to a row of n scores, or sets them to -inf where it excludes a key.
template <class S, class M>
void mask_row(S* score, int64_t n, const M* mask, int64_t stride) {
  constexpr S none = -std::numeric_limits<S>::infinity();
  for (int64_t s = 0; s < n; ++s) {
    M m = mask[s * stride];
    if constexpr (std::is_same_v<M, bool>)
      score[s] = m ? score[s] : none;
    else
      score[s] = static_cast<S>(m) == none ? none : score[s] + static_cast<S>(m);
  }
}

template <class S>
void apply_mask(const Attention& a, S* score, int64_t n, int64_t b, int64_t h, int64_t l) {
  if (!a.mask) return;
  int64_t at = b * a.mask_stride[0] + h * a.mask_stride[1] + l * a.mask_stride[2], stride = a.mask_stride[3];
  if (a.mask->scalar_type() == at::kBool) return mask_row(score, n, a.mask->const_data_ptr<bool>() + at, stride);
  with_type(a.mask->scalar_type(), [&](auto m) { mask_row(score, n, a.mask->const_data_ptr<decltype(m)>() + at, stride); });
}

// Rows l0 .. l0 + rows of head h of batch b.
template <class T>
void rows_of_head(const Attention& a, int64_t b, int64_t h, int64_t l0, int64_t rows, int64_t most_rows, T* out, Acc<T>* lse) {
  using S = Acc<T>;
  using Op = Step<T>;
  constexpr int64_t KEYS = 256;  // keys that stay in cache while the rows pass by
  int64_t hk = h / (a.Hq / a.Hkv), n = a.causal ? std::min(a.S, l0 + rows) : a.S;
  int64_t ld = up16(a.S), ldk = a.k.stride(2), ldv = a.v.stride(2);
  auto q = a.q.const_data_ptr<typename Op::A>() + b * a.q.stride(0) + h * a.q.stride(1) + l0 * a.q.stride(2);
  auto k = a.k.const_data_ptr<T>() + b * a.k.stride(0) + hk * a.k.stride(1);
  auto v = a.v.const_data_ptr<T>() + b * a.v.stride(0) + hk * a.v.stride(1);
  S* score = scratch<Scores, S>(most_rows * ld);
  double total[MOST_ROWS];
  for (int64_t s = 0; s < n; s += KEYS)
    dot_block<Op>(q, a.q.stride(2), k + s * ldk, ldk, rows, std::min(KEYS, n - s), a.D, score + s, ld);
  for (int64_t r = 0; r < rows; ++r) {
    S* row = score + r * ld;
    int64_t seen = a.causal ? std::min(n, l0 + r + 1) : n;
    S scale = static_cast<S>(a.scale);
    for (int64_t s = 0; s < seen; ++s) row[s] *= scale;
    apply_mask(a, row, seen, b, h, l0 + r);
    auto [sum, shift] = exp_row(row, seen);
    std::fill(row + seen, row + n, S(0));
    total[r] = sum;
    lse[r] = static_cast<S>(static_cast<double>(shift) + std::log(sum));
  }
  values_of_rows<T>(score, ld, total, v, ldv, rows, n, a.Dv, [&](int64_t r) { return out + r * a.Dv; });
}

void check(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& mask) {
  constexpr const char* op = "scaled_dot_product_attention";
  check_float(op, q.scalar_type());
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
              "bi_compile::", op, " takes 4-D query, key and value of one dtype, got ", q.sizes(), " ", q.scalar_type(), ", ",
              k.sizes(), " ", k.scalar_type(), ", ", v.sizes(), " ", v.scalar_type());
  TORCH_CHECK(k.size(0) == q.size(0) && k.size(3) == q.size(3) && v.size(0) == q.size(0) && v.size(1) == k.size(1) && v.size(2) == k.size(2),
              "bi_compile::", op, ": query ", q.sizes(), ", key ", k.sizes(), " and value ", v.sizes(), " do not fit together");
  TORCH_CHECK(k.size(1) > 0 ? q.size(1) % k.size(1) == 0 : q.size(1) == 0, "bi_compile::", op, ": ", q.size(1),
              " query heads are no multiple of ", k.size(1), " key heads");
  if (!mask) return;
  if (mask->scalar_type() != at::kBool) check_float("scaled_dot_product_attention (attn_mask)", mask->scalar_type());
  const int64_t full[4] = {q.size(0), q.size(1), q.size(2), k.size(2)};
  bool fits = mask->dim() <= 4;
  for (int64_t i = 1; fits && i <= mask->dim(); ++i) fits = mask->size(-i) == 1 || mask->size(-i) == full[4 - i];
  TORCH_CHECK(fits, "bi_compile::", op, ": attn_mask ", mask->sizes(), " does not broadcast to ", at::IntArrayRef(full, 4));
}

Tensor along_last(const Tensor& t) { return t.stride(3) == 1 || t.size(3) <= 1 ? t : t.contiguous(); }

std::tuple<Tensor, Tensor> scaled_dot_product_attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& mask,
                                                        bool is_causal, std::optional<double> scale) {
  Attention a;
  check(q, k, v, mask);
  a.B = q.size(0), a.Hq = q.size(1), a.L = q.size(2), a.D = q.size(3);
  a.Hkv = k.size(1), a.S = k.size(2), a.Dv = v.size(3);
  a.k = along_last(k), a.v = along_last(v), a.mask = mask, a.causal = is_causal;
  a.scale = scale.value_or(1 / std::sqrt(static_cast<double>(a.D)));
  for (int64_t i = 1; mask && i <= mask->dim(); ++i) a.mask_stride[4 - i] = mask->size(-i) == 1 ? 0 : mask->stride(-i);
  Tensor out = at::empty({a.B, a.Hq, a.L, a.Dv}, q.options().memory_format(at::MemoryFormat::Contiguous));
  Tensor lse = at::empty({a.B, a.Hq, a.L}, q.options().dtype(statistic(q)).memory_format(at::MemoryFormat::Contiguous));
  int64_t most = std::clamp<int64_t>(65536 / std::max<int64_t>(a.S, 1) / MAX_ROWS * MAX_ROWS, MAX_ROWS, MOST_ROWS);
  int64_t blocks = ceil_div(a.L, most), each = blocks ? ceil_div(a.L, blocks) : 0;
  with_type(q.scalar_type(), [&](auto t) {
    using T = decltype(t);
    a.q = along_last(q.to(c10::CppTypeToScalarType<typename Step<T>::A>::value));
    T* po = out.mutable_data_ptr<T>();
    auto pl = lse.mutable_data_ptr<Acc<T>>();
    parallel_rows(a.B * a.Hq * blocks, each * a.S * (a.D + a.Dv) / 8, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        int64_t head = task / blocks, l = task % blocks * each, rows = std::min(each, a.L - l), at = head * a.L + l;
        if (rows > 0) rows_of_head<T>(a, head / a.Hq, head % a.Hq, l, rows, each, po + at * a.Dv, pl + at);
      }
    });
  });
  return {out, lse};
}

}  // namespace

TORCH_LIBRARY_IMPL(bi_compile, CPU, m) { m.impl("scaled_dot_product_attention", scaled_dot_product_attention); }

}  // namespace bi
