// paged_attention: the requests of a step, prefill and decode alike, their keys in pages.
//
// The sums of a query are those of attention.cpp for its request alone with its keys in one piece. A score is multiplied by
// `scale`; then, where asked for, softcap * tanh(score / softcap), plus slope * (the key's place - the query's). A sink's exp is
// added last to the sum of exp. Keys in blocks of 1024 before the first that a row sees are left out: they would add zeros.
//
// write_pages_: the keys or values of a step to their places in the pages; the last of several for one place stays.

#include <ATen/ops/cat.h>

#include <atomic>

#include "attention.h"

namespace bi {
namespace {

struct Paged {
  Tensor q, k, v, table;
  int64_t Hq, Hkv, group, D, Dv, page;
  double scale;
  int64_t left, right;  // -1: no limit
  double softcap;       // 0: none
  Tensor slopes, sinks;
};

struct Task {
  int64_t request, token, rows_before, queries, keys, first_key, head;  // rows_before: queries of the request before `token`
  int64_t first_head, heads;                                            // of the queries, which share the key head `head`
};

struct Queries;

// A key's or a value's row.
template <class T>
const T* row_of(const Paged& a, const Tensor& cache, const Task& t, int64_t key, int64_t head) {
  if (!a.table.defined()) return cache.const_data_ptr<T>() + (t.first_key + key) * cache.stride(0) + head * cache.stride(1);
  int64_t page = a.table.const_data_ptr<int32_t>()[t.request * a.table.stride(0) + key / a.page];
  TORCH_CHECK_INDEX(page >= 0 && page < cache.size(0), "bi_compile::paged_attention: block_table names page ", page, " for key ", key,
                    " of request ", t.request, ", and the cache has ", cache.size(0), " pages");
  return cache.const_data_ptr<T>() + page * cache.stride(0) + key % a.page * cache.stride(1) + head * cache.stride(2);
}

// The queries of one task: those of heads that share their keys, queries ascending, a query's heads side by side.
template <class T>
void rows_of_task(const Paged& a, const Task& t, T* out, Acc<T>* lse, int64_t total_queries) {
  using S = Acc<T>;
  using Op = Step<T>;
  using A = typename Op::A;
  constexpr S none = -std::numeric_limits<S>::infinity();
  int64_t rows = t.queries * t.heads, last = t.keys - total_queries + t.rows_before + t.queries - 1;
  int64_t first = t.keys - total_queries + t.rows_before;  // the first query's place among the keys
  int64_t end = a.right < 0 ? t.keys : std::clamp<int64_t>(last + a.right + 1, 0, t.keys);
  int64_t begin = a.left < 0 ? 0 : std::clamp<int64_t>(first - a.left, 0, end) / BLOCK_K * BLOCK_K, n = end - begin;
  int64_t ld = up16(n), ldv = up16(a.Dv);
  A* q = scratch<Queries, A>(rows * a.D);
  for (int64_t i = 0; i < t.queries; ++i)
    for (int64_t g = 0; g < t.heads; ++g)
      std::memcpy(q + (i * t.heads + g) * a.D,
                  a.q.const_data_ptr<A>() + (t.token + i) * a.q.stride(0) + (t.first_head + g) * a.q.stride(1), a.D * sizeof(A));
  S* score = scratch<Scores, S>(std::max<int64_t>(rows * ld, 1));
  T* v = scratch<Task, T>(std::max<int64_t>(n * ldv, 1));
  constexpr int64_t KEYS = 256;  // keys that stay in cache while the rows pass by
  for (int64_t s = begin; s < end;) {
    int64_t many = std::min({KEYS, end - s, a.page - s % a.page});
    int64_t ldk = a.k.stride(a.table.defined() ? 1 : 0), from = a.v.stride(a.table.defined() ? 1 : 0);
    dot_block<Op>(q, a.D, row_of<T>(a, a.k, t, s, t.head), ldk, rows, many, a.D, score + s - begin, ld);
    const T* values = row_of<T>(a, a.v, t, s, t.head);
    for (int64_t i = 0; i < many; ++i) std::memcpy(v + (s - begin + i) * ldv, values + i * from, a.Dv * sizeof(T));
    s += many;
  }
  double total[MOST_ROWS];
  for (int64_t r = 0; r < rows; ++r) {
    int64_t head = t.first_head + r % t.heads, place = first + r / t.heads;
    int64_t low = std::clamp<int64_t>(a.left < 0 ? begin : place - a.left, begin, end) - begin;
    int64_t seen = std::clamp<int64_t>(a.right < 0 ? end : place + a.right + 1, begin, end) - begin;
    S* row = score + r * ld;
    S scale = static_cast<S>(a.scale), cap = static_cast<S>(a.softcap);
    for (int64_t s = low; s < seen; ++s) row[s] *= scale;
    if (cap != 0)
      for (int64_t s = low; s < seen; ++s) row[s] = cap * std::tanh(row[s] / cap);
    if (a.slopes.defined()) {
      S slope = static_cast<S>(a.slopes.const_data_ptr<float>()[head]);
      for (int64_t s = low; s < seen; ++s) row[s] += slope * static_cast<S>(begin + s - place);
    }
    std::fill(row, row + std::min(low, seen), none);
    auto [sum, shift] = exp_row(row, seen, a.sinks.defined() ? static_cast<S>(a.sinks.const_data_ptr<float>()[head]) : none);
    std::fill(row + seen, row + n, S(0));
    total[r] = sum;
    lse[(t.token + r / t.heads) * a.Hq + head] = static_cast<S>(static_cast<double>(shift) + std::log(sum));
  }
  values_of_rows<T>(score, ld, total, v, ldv, rows, n, a.Dv,
                    [&](int64_t r) { return out + ((t.token + r / t.heads) * a.Hq + t.first_head + r % t.heads) * a.Dv; });
}

Tensor of_heads(const OptTensor& x, const char* what, int64_t heads) {
  if (!x) return {};
  TORCH_CHECK(x->dim() == 1 && x->size(0) == heads && x->is_floating_point(), "bi_compile::paged_attention: ", what, " is ", x->sizes(), " ",
              x->scalar_type(), ", and there are ", heads, " query heads");
  return x->to(at::kFloat).contiguous();
}

Tensor along_last(const Tensor& t) { return t.stride(-1) == 1 || t.size(-1) <= 1 ? t : t.contiguous(); }

void check(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lengths, const OptTensor& table, int64_t left, int64_t right) {
  constexpr const char* op = "bi_compile::paged_attention";
  int64_t rank = table ? 4 : 3;
  check_float("paged_attention", q.scalar_type());
  TORCH_CHECK(q.dim() == 3 && k.dim() == rank && v.dim() == rank && q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
              op, " takes a 3-D query and ", rank, "-D key and value ", table ? "with" : "without", " a block_table, of one dtype, got ",
              q.sizes(), " ", q.scalar_type(), ", ", k.sizes(), " ", k.scalar_type(), ", ", v.sizes(), " ", v.scalar_type());
  TORCH_CHECK(k.sizes().slice(0, rank - 1) == v.sizes().slice(0, rank - 1) && q.size(2) == k.size(-1) &&
                  (k.size(-2) ? q.size(1) % k.size(-2) == 0 : q.size(1) == 0),
              op, ": query ", q.sizes(), ", key ", k.sizes(), " and value ", v.sizes(),
              " do not fit: heads of one length in query and key, query heads a multiple of key heads, as many keys as values");
  TORCH_CHECK(lengths.scalar_type() == at::kInt && lengths.dim() == 2 && lengths.size(0) == 2 && lengths.is_cpu() &&
                  (!table || (table->scalar_type() == at::kInt && table->dim() == 2 && table->is_cpu() && table->size(0) == lengths.size(1))),
              op, " takes lengths [2, requests] and block_table [requests, pages], int32, on the CPU, got ", lengths.sizes(), " ",
              lengths.scalar_type(), table ? " and another block_table" : "");
  TORCH_CHECK(left >= 0 && right >= 0, op, ": left=", left, " and right=", right, " count keys beside a query's own position and are not negative");
}

Tensor with_rope(const Tensor& x, const OptTensor& rope) { return rope ? at::cat({x, *rope}, -1) : x; }

std::tuple<Tensor, Tensor> paged_attention(const Tensor& query, const Tensor& key, const Tensor& v, const Tensor& lengths,
                                           const OptTensor& table, const OptTensor& query_rope, const OptTensor& key_rope,
                                           std::optional<double> scale, std::optional<int64_t> left, std::optional<int64_t> right,
                                           std::optional<double> softcap, const OptTensor& slopes, const OptTensor& sinks) {
  TORCH_CHECK(query_rope.has_value() == key_rope.has_value(), "bi_compile::paged_attention: query_rope and key_rope are given together");
  Tensor q = with_rope(query, query_rope), k = with_rope(key, key_rope);
  check(q, k, v, lengths, table, left.value_or(0), right.value_or(0));
  Paged a;
  a.Hq = q.size(1), a.Hkv = k.size(-2), a.D = q.size(2), a.Dv = v.size(-1), a.group = a.Hkv ? a.Hq / a.Hkv : 1;
  a.k = along_last(k), a.v = along_last(v);
  if (table) a.table = table->stride(-1) == 1 || table->size(-1) <= 1 ? *table : table->contiguous();
  a.page = table ? k.size(1) : std::numeric_limits<int64_t>::max();
  a.scale = scale.value_or(a.D ? 1 / std::sqrt(static_cast<double>(a.D)) : 0);
  a.left = left.value_or(-1), a.right = right.value_or(-1), a.softcap = softcap.value_or(0);
  a.slopes = of_heads(slopes, "alibi_slopes", a.Hq), a.sinks = of_heads(sinks, "sinks", a.Hq);
  Tensor out = at::empty({q.size(0), a.Hq, a.Dv}, q.options().memory_format(at::MemoryFormat::Contiguous)).zero_();
  Tensor lse = at::empty({q.size(0), a.Hq}, q.options().dtype(statistic(q)).memory_format(at::MemoryFormat::Contiguous));
  lse.fill_(-std::numeric_limits<double>::infinity());
  Tensor ends = lengths.contiguous();
  auto tokens = ends.const_data_ptr<int32_t>(), counts = tokens + lengths.size(1);
  std::vector<std::pair<Task, int64_t>> tasks;  // and how many queries the request has
  int64_t cost = 0;
  for (int64_t r = 0, token = 0, first_key = 0; r < lengths.size(1); ++r) {
    int64_t queries = tokens[r] - token, keys = table ? counts[r] : counts[r] - first_key;
    TORCH_CHECK_INDEX(queries >= 0 && tokens[r] <= q.size(0) && keys >= 0 && (table ? keys <= table->size(1) * a.page : counts[r] <= k.size(0)),
                      "bi_compile::paged_attention: request ", r, " has ", queries, " queries up to token ", tokens[r], " of ", q.size(0), " and ",
                      keys, " keys, and ", table ? "block_table holds pages for " : "there are keys up to ",
                      table ? table->size(1) * a.page : k.size(0));
    int64_t heads = std::clamp<int64_t>(a.group, 1, MOST_ROWS), most = std::clamp<int64_t>(65536 / std::max<int64_t>(keys, 1), heads, MOST_ROWS) / heads;
    for (int64_t i = 0; keys && i < queries; i += most)
      for (int64_t h = 0; h < a.Hq; h += std::min(heads, a.group - h % a.group)) {
        int64_t some = std::min(heads, a.group - h % a.group), rows = std::min(most, queries - i);
        tasks.push_back({{r, token + i, i, rows, keys, table ? 0 : first_key, h / a.group, h, some}, queries});
        cost += rows * some * keys * (a.D + a.Dv) / 8;
      }
    token = tokens[r];
    if (!table) first_key = counts[r];
  }
  with_type(q.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    a.q = along_last(q.to(c10::CppTypeToScalarType<typename Step<T>::A>::value));
    T* po = out.mutable_data_ptr<T>();
    auto pl = lse.mutable_data_ptr<Acc<T>>();
    std::atomic<size_t> next{0};  // tasks differ in length: each thread takes the next one when it has finished
    int64_t threads = std::min<int64_t>(at::get_num_threads(), tasks.size());
    parallel_rows(threads, cost / std::max<int64_t>(threads, 1), [&](int64_t, int64_t) {
      for (size_t i = next++; i < tasks.size(); i = next++) rows_of_task<T>(a, tasks[i].first, po, pl, tasks[i].second);
    });
  });
  return {out, lse};
}

void write_pages(Tensor& cache, const Tensor& rows, const Tensor& slots) {
  constexpr const char* op = "bi_compile_cpu::write_pages_";
  TORCH_CHECK(cache.dim() == 4 && rows.dim() == 3 && rows.size(1) == cache.size(2) && rows.size(2) == cache.size(3), op,
              " takes a cache [pages, page_size, Hkv, D] and rows [T, Hkv, D], got ", cache.sizes(), " and ", rows.sizes());
  TORCH_CHECK(slots.dim() == 1 && slots.size(0) <= rows.size(0), op, " takes one slot for each row, got ", slots.sizes(), " for ", rows.sizes());
  TORCH_CHECK(cache.stride(3) == 1 || cache.size(3) <= 1, op, " takes a cache whose last dimension is contiguous, got strides ", cache.strides());
  Tensor from = along_last(rows.to(cache.scalar_type())), where = slots.to(at::kLong).contiguous();
  const int64_t *slot = where.const_data_ptr<int64_t>(), page_size = cache.size(1), places = cache.size(0) * page_size, T = where.size(0);
  for (int64_t t = 0; t < T; ++t)
    TORCH_CHECK_INDEX(slot[t] < places, op, ": row ", t, " goes to slot ", slot[t], ", and the cache has ", places);
  auto source = static_cast<const char*>(from.const_data_ptr());
  auto target = static_cast<char*>(cache.mutable_data_ptr());
  int64_t size = cache.element_size(), bytes = cache.size(3) * size;
  parallel_rows(cache.size(2), T * cache.size(3), [&](int64_t begin, int64_t end) {  // a head's rows by one thread, ascending
    for (int64_t t = 0; t < T; ++t)
      for (int64_t h = begin; h < end && slot[t] >= 0; ++h)
        std::memcpy(target + (slot[t] / page_size * cache.stride(0) + slot[t] % page_size * cache.stride(1) + h * cache.stride(2)) * size,
                    source + (t * from.stride(0) + h * from.stride(1)) * size, bytes);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(bi_compile, CPU, m) { m.impl("paged_attention", paged_attention); }

TORCH_LIBRARY_FRAGMENT(bi_compile_cpu, m) {
  m.def("write_pages_(Tensor(a!) cache, Tensor rows, Tensor slots) -> ()");
  m.impl("write_pages_", c10::DispatchKey::CPU, write_pages);
}

}  // namespace bi
