// In place of a CUDA device, its driver and libc10_cuda, for what bi_compile/kernels/cuda launches: tensors whose device is "cuda" lie in
// the host's memory, and a launch is written down instead of run. Nothing here computes.
#include <ATen/core/Tensor.h>
#include <ATen/cuda/EmptyTensor.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/view_native.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/cuda/impl/CUDAGuardImpl.h>
#include <cuda.h>
#include <torch/library.h>

#include <cstring>
#include <map>
#include <vector>

namespace {

const c10::Device kDevice(c10::DeviceType::CUDA, 0);
bool capturing = false;
// bytes of each argument of a kernel, whose handle is its place here + 1
std::vector<std::vector<int64_t>> kernels;
// kernel, programs, threads, bytes of shared memory, number of arguments, arguments; one launch behind the other. A tensor map is 16 of them.
std::vector<int64_t> launched;
// Whether this thread has a context of the device: a new one has none.
thread_local bool bound = false;
// where something was allocated last -> its bytes
std::map<int64_t, int64_t> allocated;

// A tensor on the device over the same memory.
at::Tensor tensor(const at::Tensor& host) {
  const auto bytes = host.storage().nbytes();
  void* const data = host.storage().mutable_data();
  c10::DataPtr pointer(data, new at::Tensor(host), [](void* kept) { delete static_cast<at::Tensor*>(kept); }, kDevice);
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, std::move(pointer), nullptr, false);
  auto result = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CUDA), host.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
  return result;
}

at::Tensor made(at::IntArrayRef sizes, at::ScalarType dtype) {
  const auto host = at::empty(sizes, at::TensorOptions().dtype(dtype));
  allocated[reinterpret_cast<int64_t>(host.const_data_ptr())] = static_cast<int64_t>(host.nbytes());
  return tensor(host);
}

at::Tensor empty(at::IntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
                 std::optional<bool>, std::optional<at::MemoryFormat>) {
  return made(sizes, dtype.value_or(at::kFloat));
}

at::Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device>, std::optional<bool>) {
  return tensor(at::empty_strided(sizes, strides, at::TensorOptions().dtype(dtype.value_or(at::kFloat))));
}

at::Tensor to_copy(const at::Tensor& x, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
                   std::optional<bool>, bool, std::optional<at::MemoryFormat>) {
  return made(x.sizes(), dtype.value_or(x.scalar_type()));
}

at::Tensor copy_of(const at::Tensor& x, std::optional<at::MemoryFormat>) { return made(x.sizes(), x.scalar_type()); }

int64_t kernel(std::vector<int64_t> sizes) {
  kernels.push_back(std::move(sizes));
  return static_cast<int64_t>(kernels.size());
}

std::vector<int64_t> launches() { return std::exchange(launched, {}); }
int64_t bytes_at(int64_t pointer) { return allocated.count(pointer) ? allocated[pointer] : -1; }
void capture(bool on) { capturing = on; }

}  // namespace

C10_REGISTER_GUARD_IMPL(CUDA, c10::cuda::impl::CUDAGuardImpl)

TORCH_LIBRARY(cuda_stand_in, m) {
  m.def("tensor(Tensor(a) host) -> Tensor(a)", &tensor);
  m.def("kernel(int[] sizes) -> int", &kernel);
  m.def("launches() -> int[]", &launches);
  m.def("bytes_at(int pointer) -> int", &bytes_at);
  m.def("capture(bool on) -> ()", &capture);
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("clone", &copy_of);
  m.impl("_to_copy", &to_copy);
}

namespace at::detail {
TensorBase empty_cuda(IntArrayRef sizes, ScalarType dtype, std::optional<Device>, std::optional<c10::MemoryFormat>) {
  return made(sizes, dtype);
}
}  // namespace at::detail

namespace c10::cuda {
DeviceIndex device_count() noexcept { return 1; }
DeviceIndex current_device() { return 0; }
cudaError_t GetDevice(DeviceIndex* index) { return *index = 0, cudaSuccess; }
cudaError_t SetDevice(DeviceIndex, bool) { return cudaSuccess; }
cudaError_t MaybeSetDevice(DeviceIndex) { return cudaSuccess; }
DeviceIndex ExchangeDevice(DeviceIndex) { return 0; }
DeviceIndex MaybeExchangeDevice(DeviceIndex) { return 0; }
void c10_cuda_check_implementation(int32_t error, const char*, const char*, uint32_t, bool) {
  TORCH_CHECK(error == cudaSuccess, "CUDA error ", error);
}
CUDAStream getCurrentCUDAStream(DeviceIndex) {
  return CUDAStream(CUDAStream::UNCHECKED, c10::Stream(c10::Stream::DEFAULT, kDevice));
}
cudaStream_t CUDAStream::stream() const { return nullptr; }

// What PyTorch's headers refer to and nothing here calls.
std::atomic<CUDACachingAllocator::CUDAAllocator*> CUDACachingAllocator::allocator{nullptr};
CUDAStream getStreamFromPool(int, DeviceIndex) { TORCH_CHECK(false); }
CUDAStream getStreamFromPool(bool, DeviceIndex) { TORCH_CHECK(false); }
CUDAStream getDefaultCUDAStream(DeviceIndex) { TORCH_CHECK(false); }
void setCurrentCUDAStream(CUDAStream) { TORCH_CHECK(false); }
void CUDAStream::synchronize() const { TORCH_CHECK(false); }
bool CUDAStream::query() const { TORCH_CHECK(false); }
}  // namespace c10::cuda

extern "C" {
cudaError_t cudaSetDevice(int) { return bound = true, cudaSuccess; }

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

CUresult cuFuncGetParamInfo(CUfunction function, size_t index, size_t* offset, size_t* size) {
  const auto& sizes = kernels.at(reinterpret_cast<size_t>(function) - 1);
  if (index >= sizes.size()) return CUDA_ERROR_INVALID_VALUE;
  *offset = 0, *size = static_cast<size_t>(sizes[index]);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned, unsigned, unsigned threads, unsigned, unsigned, unsigned shared, CUstream,
                        void** arguments, void**) {
  if (!bound) return CUDA_ERROR_INVALID_CONTEXT;
  const auto& sizes = kernels.at(reinterpret_cast<size_t>(function) - 1);
  launched.insert(launched.end(), {reinterpret_cast<int64_t>(function), x, threads, shared, 0});
  const auto count = launched.size() - 1;
  for (size_t i = 0; i < sizes.size(); ++i) {
    std::array<int64_t, 16> values{};
    std::memcpy(values.data(), arguments[i], static_cast<size_t>(sizes[i]));
    if (sizes[i] == 4) values[0] = static_cast<int32_t>(values[0]);
    launched.insert(launched.end(), values.begin(), values.begin() + (sizes[i] == 128 ? 16 : 1));
  }
  launched[count] = static_cast<int64_t>(launched.size() - count - 1);
  return CUDA_SUCCESS;
}

// What it is given, in the order of `_described` in __init__.py.
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* sizes,
                                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  *map = {{reinterpret_cast<cuuint64_t>(address), type, rank, sizes[0], sizes[1], strides[0], box[0], box[1], steps[0], steps[1],
           interleave, swizzle, promotion, fill}};
  return CUDA_SUCCESS;
}

CUresult cuTensorMapReplaceAddress(CUtensorMap* map, void* address) {
  map->opaque[0] = reinterpret_cast<cuuint64_t>(address);
  return CUDA_SUCCESS;
}
}
