#include "recorded.h"

#include <algorithm>
#include <memory>
#include <shared_mutex>
#include <unordered_map>

namespace bi_compile {
namespace {

// What a call does: what it allocates, then launches. A launch's slots are the tensors that were given, the results, and the rooms.
struct Calls {
  std::vector<std::pair<at::ScalarType, std::vector<int64_t>>> results;  // dtype, sizes
  std::vector<int64_t> rooms;  // bytes
  std::vector<Launch> launches;  // none: the call does something else too
};

// All of them are forgotten when there are so many (some 20 MB): a sequence that grows has other sizes at every step.
constexpr size_t kMost = 1 << 13;
std::shared_mutex table_lock;
// Null: there was one such call, which was not recorded, since what comes once need not be.
std::unordered_map<std::vector<int64_t>, std::shared_ptr<const Calls>, KeyHash> table;

// The arguments of a call: all that Triton's functions can see of them but for what the tensors hold.
struct Given {
  std::vector<int64_t> key;
  std::vector<const void*> pointers;
  std::optional<at::Device> device;

  void clear(const void* op) {
    key.assign(1, reinterpret_cast<int64_t>(op));
    pointers.clear();
    device.reset();
  }

  template <class... T>
  bool put(T... parts) {
    (key.push_back(static_cast<int64_t>(parts)), ...);
    return true;
  }

  // False where it is of a kind that is not known here.
  bool add(const c10::IValue& value) {
    if (value.isTensor()) return add(value.toTensor());
    if (value.isNone()) return put('n');
    if (value.isBool()) return put('b', value.toBool());
    if (value.isInt()) return put('i', value.toInt());
    if (value.isDouble()) return put('d', std::bit_cast<int64_t>(value.toDouble()));
    if (!value.isIntList()) return false;
    const auto list = value.toIntList();
    put('l', list.size());
    for (const int64_t each : list) put(each);
    return true;
  }

  bool add(const at::Tensor& x) {
    if (!x.defined() || x.layout() != at::kStrided || x.numel() == 0 || !aligned(x)) return false;
    if (device && *device != x.device()) return false;
    device = x.device();
    if (!device->is_cuda()) return false;
    const auto* const at = x.const_data_ptr();
    const auto same = std::find(pointers.begin(), pointers.end(), at) - pointers.begin();
    pointers.push_back(at);
    put('t', x.scalar_type(), device->index(), same, x.dim());
    key.insert(key.end(), x.sizes().begin(), x.sizes().end());
    key.insert(key.end(), x.strides().begin(), x.strides().end());
    return true;
  }
};

// What such a call does, if that is known; once: whether this is the first one.
std::shared_ptr<const Calls> find(const std::vector<int64_t>& key, bool& once) {
  {
    std::shared_lock lock(table_lock);
    const auto it = table.find(key);
    if (it != table.end()) return it->second;
  }
  once = true;
  std::unique_lock lock(table_lock);
  if (table.size() >= kMost) table.clear();
  table.try_emplace(key);
  return nullptr;
}

// results: as the call returned them; rooms: bytes; launches: their descriptions. Without launches the call is Python's from now on.
void record(const std::vector<int64_t>& key, const std::vector<at::Tensor>& results, const std::vector<int64_t>& rooms,
            const std::vector<std::vector<int64_t>>& launches) {
  auto calls = std::make_shared<Calls>();
  for (const auto& r : results) calls->results.emplace_back(r.scalar_type(), r.sizes().vec());
  calls->rooms = rooms;
  for (const auto& l : launches) calls->launches.push_back(launch_of(l));
  std::unique_lock lock(table_lock);
  table.insert_or_assign(key, std::move(calls));
}

// From now on calls of bi_compile::<name> come here.
void take(const std::string& name) {
  static std::vector<c10::RegistrationHandleRAII> kept;
  kept.push_back(c10::Dispatcher::singleton().registerImpl({"bi_compile::" + name, ""}, c10::DispatchKey::CUDA,
                                                           c10::KernelFunction::makeFromBoxedFunctor(std::make_unique<Recorded>(name)),
                                                           std::nullopt, nullptr, "bi_compile"));
}

}  // namespace

void Recorded::call(torch::jit::Stack& stack) {
  const auto count = python_.schema().arguments().size() - 1;
  thread_local Given given;
  given.clear(this);
  bool plain = true, once = false;
  for (const auto& value : torch::jit::last(stack, count)) plain = plain && given.add(value);
  plain = plain && given.device;
  const auto known = plain ? find(given.key, once) : nullptr;
  if (known == nullptr || known->launches.empty()) {
    stack.emplace_back(plain && known == nullptr && !once ? given.key : std::vector<int64_t>());
    const at::AutoDispatchBelowADInplaceOrView below;
    return python_.callBoxed(stack);
  }
  // copies, since an allocator may be Python's, which may come here again
  const auto device = *given.device;
  c10::SmallVector<const void*, 16> slots(given.pointers.begin(), given.pointers.end());
  c10::SmallVector<at::Tensor, 4> made;
  const c10::cuda::CUDAGuard guard(device);
  const auto make = [&](at::IntArrayRef sizes, at::ScalarType dtype) {
    made.push_back(at::detail::empty_cuda(sizes, dtype, device, std::nullopt));
    slots.push_back(made.back().const_data_ptr());
  };
  for (const auto& [dtype, sizes] : known->results) make(sizes, dtype);
  for (const auto bytes : known->rooms) make({bytes}, at::kByte);
  for (const auto& it : known->launches) launch(it, it.programs, slots, {});
  torch::jit::drop(stack, count);
  for (size_t i = 0; i < known->results.size(); ++i) stack.emplace_back(std::move(made[i]));
}

}  // namespace bi_compile

TORCH_LIBRARY_FRAGMENT(bi_compile_cuda, m) {
  m.def("take(str name) -> ()", &bi_compile::take);
  m.def("record(int[] key, Tensor[] results, int[] rooms, int[][] launches) -> ()", &bi_compile::record);
}

