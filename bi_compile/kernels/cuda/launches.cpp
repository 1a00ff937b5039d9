#include "launches.h"

#include <dlfcn.h>

#include <algorithm>
#include <shared_mutex>
#include <unordered_map>

namespace bi_compile {
namespace {

struct KeyHash {
  size_t operator()(const Key& key) const {
    uint64_t h = 14695981039346656037u;
    for (const auto part : key) h = (h ^ static_cast<uint64_t>(part)) * 1099511628211u;
    return h ^ (h >> 29);
  }
};

// What an argument of the kernel is: one of `slots` (a pointer), one of `numbers`, or a constant.
enum Kind : int64_t { kSlot = 0, kNumber = 1, kConstant = 2 };

constexpr size_t kMostArguments = 64;
std::shared_mutex table_lock;
std::unordered_map<Key, Launch, KeyHash> table;

// The driver, which PyTorch has loaded already.
void* driver(const char* name) {
  static void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  void* const found = library == nullptr ? nullptr : dlsym(library, name);
  TORCH_CHECK(found != nullptr, "the CUDA driver has no ", name, ": bi_compile needs driver 550 or newer");
  return found;
}

// Calls with this key launch `function` from now on. sizes: bytes of each argument. What the binary takes behind them are
// Triton's scratch pointers, which are null. Raises where the binary does not take these.
void learn(const std::vector<int64_t>& key, int64_t function, int64_t threads, int64_t shared, int64_t rows_per_program,
           const std::vector<int64_t>& kinds, const std::vector<int64_t>& values, const std::vector<int64_t>& sizes) {
  static const auto parameter = reinterpret_cast<decltype(&cuFuncGetParamInfo)>(driver("cuFuncGetParamInfo"));
  Key as{};
  TORCH_CHECK(key.size() <= as.size() && kinds.size() == values.size() && kinds.size() == sizes.size() && rows_per_program > 0);
  std::copy(key.begin(), key.end(), as.begin());
  Launch it{reinterpret_cast<CUfunction>(function), static_cast<unsigned>(threads), static_cast<unsigned>(shared), rows_per_program, {}};
  size_t offset = 0, size = 0;
  for (size_t i = 0; parameter(it.function, i, &offset, &size) == CUDA_SUCCESS; ++i) {
    TORCH_CHECK(i < kMostArguments, "a kernel with more than ", kMostArguments, " arguments");
    const bool known = i < kinds.size();
    TORCH_CHECK(size == (known ? static_cast<size_t>(sizes[i]) : sizeof(void*)), "argument ", i, " of the kernel has ", size, " bytes");
    it.arguments.emplace_back(known ? kinds[i] : static_cast<int64_t>(kConstant), known ? values[i] : 0);
  }
  TORCH_CHECK(it.arguments.size() >= kinds.size(), "the kernel takes ", it.arguments.size(), " arguments, not ", kinds.size());
  std::unique_lock lock(table_lock);
  table.try_emplace(as, std::move(it));
}

}  // namespace

const Launch* find(const Key& key) {
  std::shared_lock lock(table_lock);
  const auto it = table.find(key);
  return it == table.end() ? nullptr : &it->second;  // none is removed
}

void launch(const Launch& it, int64_t programs, std::initializer_list<const void*> slots, std::initializer_list<int64_t> numbers) {
  static const auto run = reinterpret_cast<decltype(&cuLaunchKernel)>(driver("cuLaunchKernel"));
  std::array<uint64_t, kMostArguments> values;
  std::array<void*, kMostArguments> pointers;
  for (size_t i = 0; i < it.arguments.size(); ++i) {
    const auto [kind, value] = it.arguments[i];
    values[i] = kind == kSlot     ? reinterpret_cast<uint64_t>(slots.begin()[value])
                : kind == kNumber ? static_cast<uint64_t>(numbers.begin()[value])
                                  : static_cast<uint64_t>(value);
    pointers[i] = &values[i];
  }
  const auto status = run(it.function, static_cast<unsigned>(programs), 1, 1, it.threads, 1, 1, it.shared,
                          c10::cuda::getCurrentCUDAStream(), pointers.data(), nullptr);
  TORCH_CHECK(status == CUDA_SUCCESS, "launching a kernel of ", programs, " programs failed with CUDA driver error ", int(status));
}

}  // namespace bi_compile

TORCH_LIBRARY_FRAGMENT(bi_compile_cuda, m) {
  m.def("learn(int[] key, int function, int threads, int shared, int rows_per_program, int[] kinds, int[] values, int[] sizes) -> ()",
        &bi_compile::learn);
}
