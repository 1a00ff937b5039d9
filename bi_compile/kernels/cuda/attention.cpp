// Attention of a server's step: what `fill` in kernels/triton/paged_attention.py does for keys in pages, in 16 bits.
#include "launches.h"

#include <algorithm>
#include <bit>

namespace bi_compile {
namespace {

// kernels/triton/tiles.py: up to how many rows each tile is taken, at which key each segment ends, how many programs times elements of a
// head leave the device idle, how many programs are many, and the longest head of more than one tile. What follows from them changes no bits.
struct Tables {
  std::vector<int64_t> tiles, segments{0};
  int64_t few = 0, many = 0, head = 0;
} tables;

void attention_tables(std::vector<int64_t> tiles, std::vector<int64_t> segments, int64_t few, int64_t many, int64_t head) {
  tables = {std::move(tiles), std::move(segments), few, many, head};
}

// As in paged_attention.py: whose queries a launch takes.
enum Which : int64_t { kAll, kLong, kShort };

bool fits(const at::Tensor& x, const at::Tensor& q, int64_t dim) {
  return x.dim() == dim && x.scalar_type() == q.scalar_type() && x.device() == q.device() && x.stride(-1) == 1 && aligned(x);
}

bool of_requests(const at::Tensor& x, const at::Tensor& q, int64_t dim) {
  return x.dim() == dim && x.scalar_type() == at::kInt && x.device() == q.device() && x.stride(-1) == 1;
}

// out [T, Hq, D], q alike, k and v [pages, page, H, D], ends and counts [R], table [R, n]. left, right: keys that a query sees before and
// behind its own, left -1: all. longest, most: no request has more queries (0: unknown), or keys; a graph that is captured has room for the
// keys that the table holds.
void fill_paged(const at::Tensor& out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& ends,
                const at::Tensor& counts, const at::Tensor& table, double scale, int64_t left, int64_t right, int64_t longest, int64_t most) {
  std::vector<Key> keys;  // of what this call launches, the join of segments last
  const bool half = q.scalar_type() == at::kBFloat16 || q.scalar_type() == at::kHalf;
  TORCH_CHECK(table.dim() == 2 && k.dim() == 4, "pages [n, page, H, D] and a table [R, n], not ", k.sizes(), " and ", table.sizes());
  const int64_t page = k.size(1), requests = ends.numel();
  if (capturing()) most = table.size(1) * page;
  if (half && fits(q, q, 3) && fits(k, q, 4) && fits(v, q, 4) && fits(out, q, 3) && out.is_contiguous() && of_requests(ends, q, 1) &&
      of_requests(counts, q, 1) && of_requests(table, q, 2) && aligned(table) && requests > 0 && q.numel() > 0 && k.size(2) > 0 &&
      most <= tables.segments.back()) {
    const int64_t tokens = q.size(0), heads = q.size(1), key_heads = k.size(2), group = heads / key_heads, head = v.size(3);
    const auto padded = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(group)));
    const auto block = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(std::max<int64_t>({q.size(2), head, 16}))));
    const int64_t low = tables.tiles.front();
    // `launches_for` in paged_attention.py
    const bool apart = longest > 0 && block <= tables.head && padded <= low;
    const int64_t rows = (apart ? longest : divided(tokens, requests)) * padded;
    const Which first = !apart ? kAll : rows <= low ? kShort : requests == 1 ? kAll : kLong;
    const int64_t tile = std::lower_bound(tables.tiles.begin(), tables.tiles.end(), rows) - tables.tiles.begin();
    const int64_t many = key_heads * requests > tables.many;
    // parted: launches.py writes the second number, by what it launched
    const auto key_of = [&](Which which, bool parted) {
      return Key{kPagedAttention, parted, q.get_device(), static_cast<int64_t>(q.scalar_type()), heads, key_heads, q.size(2), head, page,
                 which, which == kShort ? 0 : tile, many, q.stride(0), q.stride(1), k.stride(0), k.stride(1), k.stride(2), v.stride(0),
                 v.stride(1), v.stride(2), std::bit_cast<int64_t>(scale), left >= 0};
    };
    keys = {key_of(first, false)};
    if (first == kLong) keys.push_back(key_of(kShort, false));
    const Key join_key{kJoinParts, q.get_device(), static_cast<int64_t>(q.scalar_type()), head};
    const auto *whole = find(keys[0]), *parted = first == kLong ? nullptr : find(key_of(first, true));
    const auto* other = first == kLong ? find(keys[1]) : nullptr;
    if (whole != nullptr || parted != nullptr) {
      const int64_t height = (whole != nullptr ? whole : parted)->rows_per_program;
      const int64_t tiles = requests + (first == kShort ? divided(tokens * padded, height) : tokens * padded / height + 1);
      const int64_t each = tokens * heads;
      const auto& s = tables.segments;
      const bool idle = first != kLong && key_heads * tiles * block <= tables.few;
      const int64_t parts = idle ? std::lower_bound(s.begin(), s.end(), most) - s.begin() + 1 : 1;
      const auto* found = parts > 1 ? parted : whole;
      const auto* join = parts > 1 ? find(join_key) : nullptr;
      if (found != nullptr && (parts == 1 || join != nullptr) && (first != kLong || other != nullptr)) {
        const c10::cuda::CUDAGuard guard(q.device());
        const auto lse = empty(q, {each}, at::kFloat);
        const auto partial = parts > 1 ? empty(q, {parts * each * (2 + head)}, at::kFloat) : at::Tensor();
        void* const stored = parts > 1 ? partial.data_ptr() : nullptr;
        constexpr int64_t unlimited = 1 << 30;  // as in paged_attention.py
        const auto run = [&](const Launch& it, int64_t its_tiles) {
          launch(it, key_heads * its_tiles * parts,
                 {q.const_data_ptr(), k.const_data_ptr(), v.const_data_ptr(), q.const_data_ptr(), k.const_data_ptr(), ends.const_data_ptr(),
                  counts.const_data_ptr(), table.const_data_ptr(), out.data_ptr(), lse.data_ptr(), stored},
                 {tokens, requests, its_tiles, parts, left < 0 ? unlimited : std::min(left, unlimited), std::min(right, unlimited),
                  table.stride(0)});
        };
        run(*found, tiles);
        if (other != nullptr) run(*other, requests);
        if (parts > 1) launch(*join, each, {stored, out.data_ptr(), lse.data_ptr()}, {each, parts});
        return;
      }
    }
    keys.push_back(join_key);
  }
  std::vector<int64_t> flat;
  for (const auto& key : keys) flat.insert(flat.end(), key.begin(), key.end());
  static const auto triton = python<void(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                         const at::Tensor&, const at::Tensor&, double, int64_t, int64_t, int64_t, int64_t, at::IntArrayRef)>(
      "bi_compile_cuda::triton_fill_paged");
  triton.call(out, q, k, v, ends, counts, table, scale, left, right, longest, most, flat);
}

}  // namespace
}  // namespace bi_compile

TORCH_LIBRARY_FRAGMENT(bi_compile_cuda, m) {
  m.def("attention_tables(int[] tiles, int[] segments, int few, int many, int head) -> ()", &bi_compile::attention_tables);
  m.def(
      "fill_paged(Tensor(a!) out, Tensor q, Tensor k, Tensor v, Tensor ends, Tensor counts, Tensor table, float scale, int left, int right, "
      "int longest, int most) -> ()");
  m.def(
      "triton_fill_paged(Tensor(a!) out, Tensor q, Tensor k, Tensor v, Tensor ends, Tensor counts, Tensor table, float scale, int left, "
      "int right, int longest, int most, int[] keys) -> ()");
}

TORCH_LIBRARY_IMPL(bi_compile_cuda, CUDA, m) { m.impl("fill_paged", &bi_compile::fill_paged); }
