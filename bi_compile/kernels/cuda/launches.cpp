#include "launches.h"

#include <dlfcn.h>

#include <algorithm>
#include <shared_mutex>
#include <unordered_map>

namespace bi_compile {
namespace {

// What an argument of the kernel is: one of `slots` (a pointer), one of `numbers`, a constant, or one of the launch's maps.
enum Kind : int64_t { kSlot = 0, kNumber = 1, kConstant = 2, kMap = 3 };

constexpr size_t kMostArguments = 64, kMostMaps = 2;
std::shared_mutex table_lock;
std::unordered_map<Key, Launch, KeyHash> table;

// The driver, which PyTorch has loaded already.
void* driver(const char* name) {
  static void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  void* const found = library == nullptr ? nullptr : dlsym(library, name);
  TORCH_CHECK(found != nullptr, "the CUDA driver has no ", name, ": bi_compile needs driver 550 or newer");
  return found;
}

// The tensor map of a matrix [rows, columns] of 16-bit elements, as Triton encodes a descriptor's.
struct Matrix {
  int64_t slot, address, type, swizzle, rows, columns, stride, box_rows, box_columns;
};
constexpr size_t kMatrix = 9;

CUtensorMap map_of(const Matrix& x) {
  static const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(driver("cuTensorMapEncodeTiled"));
  CUtensorMap map{};
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(x.columns), static_cast<cuuint64_t>(x.rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(2 * x.stride)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(x.box_columns), static_cast<cuuint32_t>(x.box_rows)};
  const cuuint32_t steps[] = {1, 1};
  const auto status = encode(&map, static_cast<CUtensorMapDataType>(x.type), 2, reinterpret_cast<void*>(x.address), sizes, strides, box,
                             steps, CU_TENSOR_MAP_INTERLEAVE_NONE, static_cast<CUtensorMapSwizzle>(x.swizzle),
                             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  TORCH_CHECK(status == CUDA_SUCCESS, "cuTensorMapEncodeTiled failed with CUDA driver error ", int(status));
  return map;
}

// Calls with this key launch this from now on.
void learn(const std::vector<int64_t>& key, int64_t rows_per_program, const std::vector<int64_t>& description) {
  Key as{};
  TORCH_CHECK(key.size() <= as.size() && rows_per_program > 0);
  std::copy(key.begin(), key.end(), as.begin());
  auto it = launch_of(description);
  it.rows_per_program = rows_per_program;
  std::unique_lock lock(table_lock);
  table.try_emplace(as, std::move(it));
}

}  // namespace

// function, threads, bytes of shared memory, programs, number of arguments; of each argument kind, value and bytes; of each map a
// `Matrix`. What the binary takes behind its arguments are Triton's scratch pointers, which are null.
Launch launch_of(at::IntArrayRef description) {
  static const auto parameter = reinterpret_cast<decltype(&cuFuncGetParamInfo)>(driver("cuFuncGetParamInfo"));
  TORCH_CHECK(description.size() >= 5);
  Launch it{reinterpret_cast<CUfunction>(description[0]), static_cast<unsigned>(description[1]), static_cast<unsigned>(description[2]),
            description[3], 0, {}, {}};
  const auto given = description.slice(5, 3 * description[4]);
  const auto maps = description.slice(5 + given.size());
  size_t offset = 0, size = 0;
  for (size_t i = 0; parameter(it.function, i, &offset, &size) == CUDA_SUCCESS; ++i) {
    TORCH_CHECK(i < kMostArguments, "a kernel with more than ", kMostArguments, " arguments");
    const bool known = 3 * i < given.size();
    TORCH_CHECK(size == (known ? static_cast<size_t>(given[3 * i + 2]) : sizeof(void*)), "argument ", i, " of the kernel has ", size, " bytes");
    it.arguments.emplace_back(known ? given[3 * i] : static_cast<int64_t>(kConstant), known ? given[3 * i + 1] : 0);
  }
  TORCH_CHECK(3 * it.arguments.size() >= given.size(), "the kernel takes ", it.arguments.size(), " arguments, not ", given.size() / 3);
  TORCH_CHECK(maps.size() % kMatrix == 0 && maps.size() <= kMostMaps * kMatrix, "a kernel with more than ", kMostMaps, " descriptors");
  for (size_t i = 0; i < maps.size(); i += kMatrix) {
    const auto m = maps.slice(i, kMatrix);
    it.maps.emplace_back(map_of({m[0], m[1], m[2], m[3], m[4], m[5], m[6], m[7], m[8]}), m[0]);
  }
  return it;
}

const Launch* find(const Key& key) {
  std::shared_lock lock(table_lock);
  const auto it = table.find(key);
  return it == table.end() ? nullptr : &it->second;  // none is removed
}

void launch(const Launch& it, int64_t programs, at::ArrayRef<const void*> slots, at::IntArrayRef numbers) {
  static const auto run = reinterpret_cast<decltype(&cuLaunchKernel)>(driver("cuLaunchKernel"));
  std::array<uint64_t, kMostArguments> values;
  std::array<void*, kMostArguments> pointers;
  std::array<CUtensorMap, kMostMaps> maps;
  for (size_t i = 0; i < it.maps.size(); ++i) {
    static const auto replace = reinterpret_cast<decltype(&cuTensorMapReplaceAddress)>(driver("cuTensorMapReplaceAddress"));
    maps[i] = it.maps[i].first;
    const auto status = replace(&maps[i], const_cast<void*>(slots[it.maps[i].second]));
    TORCH_CHECK(status == CUDA_SUCCESS, "cuTensorMapReplaceAddress failed with CUDA driver error ", int(status));
  }
  for (size_t i = 0; i < it.arguments.size(); ++i) {
    const auto [kind, value] = it.arguments[i];
    values[i] = kind == kSlot     ? reinterpret_cast<uint64_t>(slots[value])
                : kind == kNumber ? static_cast<uint64_t>(numbers[value])
                                  : static_cast<uint64_t>(value);
    pointers[i] = kind == kMap ? static_cast<void*>(&maps[value]) : &values[i];
  }
  const auto launched = [&] {
    return run(it.function, static_cast<unsigned>(programs), 1, 1, it.threads, 1, 1, it.shared, c10::cuda::getCurrentCUDAStream(),
               pointers.data(), nullptr);
  };
  auto status = launched();
  // the runtime's functions bind a thread to the device; where the driver's launch is the first that a thread does, nothing has
  if (status == CUDA_ERROR_INVALID_CONTEXT && cudaSetDevice(c10::cuda::current_device()) == cudaSuccess) status = launched();
  TORCH_CHECK(status == CUDA_SUCCESS, "launching a kernel of ", programs, " programs failed with CUDA driver error ", int(status));
}

}  // namespace bi_compile

TORCH_LIBRARY_FRAGMENT(bi_compile_cuda, m) {
  m.def("learn(int[] key, int rows_per_program, int[] description) -> ()", &bi_compile::learn);
}
