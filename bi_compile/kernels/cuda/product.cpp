// mm and addmm by cuBLASLt, each with an algorithm that was pinned for its shape; what has none goes to the Triton kernel.
//
// Nothing here chooses an algorithm. `proof.py` asks for those that neither split K nor use a workspace, compares their
// bits with the Triton kernel's, times them, and pins one for each range of heights (`kHeights`). The height may decide
// which of them runs, since all of them have one order.
#include "recorded.h"

// cuBLASLt's header includes CUDA's 16-bit types, whose headers need CUDA's C++ library, which pip does not install. No
// function that is called here takes one, so a declaration serves.
#define __CUDA_FP16_H__
#define __CUDA_BF16_H__
struct __half;
struct __nv_bfloat16;
#include <cublasLt.h>

#include <c10/cuda/CUDAException.h>

#include <array>
#include <cstring>
#include <shared_mutex>
#include <unordered_map>

namespace bi_compile {
namespace {

// The last height of each range; the range behind the last one has no end.
constexpr std::array<int64_t, 20> kHeights = {1,   8,   16,  32,  48,   64,   96,   128,  192,  256,
                                              384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192};
constexpr size_t kRanges = kHeights.size() + 1;
// A product with a smaller b is not worth the time of a proof.
constexpr int64_t kSmallest = 1 << 18;

enum Form : int64_t { kPlain = 0, kBias = 1, kAddend = 2 };  // a @ b; + bias[N]; + addend[M, N]

// Where the operands of a product lie, as cuBLASLt can read them: rows (b: or columns) contiguous, 16-byte aligned.
struct Operands {
  int64_t m, n, k, lda, ldb, ldc;
  bool by_column;  // b is the transpose of a contiguous [N, K]
  Form form;

  bool operator==(const Operands&) const = default;
};

struct Weight {
  int64_t n, k, kind;
  bool operator==(const Weight& o) const { return n == o.n && k == o.k && kind == o.kind; }
};

struct WeightHash {
  size_t operator()(const Weight& key) const {
    return static_cast<size_t>(((key.n * 1000003) ^ key.k) * 1000003 ^ key.kind);
  }
};

// Where the Triton kernel computes a product that cuBLASLt may compute too.
enum Triton : int64_t { kNowhere = 0, kOutsideGraphs = 1, kEverywhere = 2 };

struct Pinned {
  bool native = false;  // false: the Triton kernel, for want of a proof
  Triton triton = kNowhere;
  cublasLtMatmulAlgo_t algo{};
};

std::shared_mutex table_lock;
std::unordered_map<Weight, std::array<Pinned, kRanges>, WeightHash> table;

size_t range_of(int64_t m) {
  size_t i = 0;
  while (i < kHeights.size() && m > kHeights[i]) ++i;
  return i;
}

Weight key_of(const at::Tensor& a, const Operands& o) {
  const auto type = static_cast<int64_t>(a.scalar_type());
  return {o.n, o.k, (static_cast<int64_t>(a.get_device()) << 16) | (type << 8) | (o.form << 1) | o.by_column};
}

// The distance of `rows` contiguous runs of `length`, or 0 where they cannot be read in words of 16 bytes, `word` elements.
int64_t apart(int64_t rows, int64_t length, int64_t stride, int64_t unit, int64_t word) {
  const auto distance = rows > 1 ? stride : (length + word - 1) / word * word;
  return (unit == 1 || length == 1) && distance >= length && distance % word == 0 ? distance : 0;
}

bool readable(const at::Tensor& a, const at::Tensor& b, const at::Tensor* bias, Operands& o) {
  if (a.dim() != 2 || b.dim() != 2) return false;
  const auto type = a.scalar_type();
  if ((type != at::kBFloat16 && type != at::kHalf && type != at::kFloat) || b.scalar_type() != type || b.device() != a.device()) return false;
  o.m = a.size(0), o.k = a.size(1), o.n = b.size(1);
  if (b.size(0) != o.k || o.m == 0 || o.n < 2 || o.k < 2 || o.n > INT32_MAX || o.k > INT32_MAX) return false;
  if (o.n * o.k < kSmallest || o.m > INT32_MAX / o.n || !aligned(a) || !aligned(b)) return false;
  const auto word = 16 / static_cast<int64_t>(a.element_size());
  o.lda = apart(o.m, o.k, a.stride(0), a.stride(1), word);
  o.ldb = apart(o.n, o.k, b.stride(1), b.stride(0), word);
  o.by_column = o.ldb != 0;
  if (!o.by_column) o.ldb = apart(o.k, o.n, b.stride(0), b.stride(1), word);
  if (o.lda == 0 || o.ldb == 0) return false;
  o.form = kPlain;
  o.ldc = o.n;
  if (bias == nullptr) return true;
  if (bias->scalar_type() != type || bias->device() != a.device() || !aligned(*bias)) return false;
  const auto last = bias->dim() - 1;
  if (last < 0 || last > 1 || bias->size(last) != o.n || bias->stride(last) != 1) return false;
  if (last == 0 || (bias->stride(0) == 0 && bias->size(0) == o.m)) {
    o.form = kBias;
    return true;
  }
  o.form = kAddend;
  o.ldc = apart(o.m, o.n, bias->stride(0), 1, word);
  return bias->size(0) == o.m && o.ldc != 0;
}

void check(cublasStatus_t status, const char* what) {
  TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS, "cuBLASLt: ", what, " failed: ", cublasLtGetStatusString(status));
}

// cuBLASLt's view of a product. It reads columns, so it computes out^T [N, M] = b^T a^T.
struct Problem {
  cublasLtMatmulDescOpaque_t desc;
  cublasLtMatrixLayoutOpaque_t b, a, c, d;

  Problem(const Operands& o, at::ScalarType dtype, const void* bias) {
    const auto type = dtype == at::kFloat ? CUDA_R_32F : dtype == at::kHalf ? CUDA_R_16F : CUDA_R_16BF;
    // of float32: float32 products, no TF32
    check(cublasLtMatmulDescInit(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F), "cublasLtMatmulDescInit");
    if (o.by_column) set(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
    if (o.form == kBias) {
      set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
      add(bias);
    }
    layout(b, type, o.by_column ? o.k : o.n, o.by_column ? o.n : o.k, o.ldb);
    layout(a, type, o.k, o.m, o.lda);
    layout(c, type, o.n, o.m, o.ldc);
    layout(d, type, o.n, o.m, o.n);
  }

  template <class T>
  void set(cublasLtMatmulDescAttributes_t attribute, const T& value) {
    check(cublasLtMatmulDescSetAttribute(&desc, attribute, &value, sizeof(value)), "cublasLtMatmulDescSetAttribute");
  }

  void add(const void* bias) { set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias); }

  static void layout(cublasLtMatrixLayoutOpaque_t& it, cudaDataType type, int64_t rows, int64_t cols, int64_t ld) {
    check(cublasLtMatrixLayoutInit(&it, type, rows, cols, ld), "cublasLtMatrixLayoutInit");
  }
};

// The last ones stay described: a program multiplies by the same weights at every step.
Problem& problem_of(const Operands& o, at::ScalarType dtype, const void* bias) {
  struct Known {
    Operands operands;
    at::ScalarType dtype;
    Problem problem;
  };
  thread_local std::array<std::optional<Known>, 64> known;
  const auto hash = WeightHash()({o.n, o.k, (o.m << 4) | (o.form << 1) | o.by_column});
  auto& it = known[hash * 0x9E3779B97F4A7C15u >> 58];  // sizes are multiples of a power of two, so the high bits
  if (it && it->dtype == dtype && it->operands == o) {
    if (o.form == kBias) it->problem.add(bias);
  } else {
    it.emplace(o, dtype, Problem(o, dtype, bias));
  }
  return it->problem;
}

cublasLtHandle_t handle(c10::DeviceIndex device) {
  constexpr int kDevices = 64;
  static std::array<cublasLtHandle_t, kDevices> handles{};
  static std::array<std::once_flag, kDevices> made;
  TORCH_CHECK(device < kDevices, "bi_compile's products know ", kDevices, " devices, this is number ", int(device));
  std::call_once(made[device], [&] { check(cublasLtCreate(&handles[device]), "cublasLtCreate"); });
  return handles[device];
}

cublasStatus_t run(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, const at::Tensor* bias,
                   const Operands& o, const cublasLtMatmulAlgo_t& algo, void* workspace, size_t bytes) {
  const float one = 1, beta = o.form == kAddend ? 1 : 0;
  const void* added = bias == nullptr ? nullptr : bias->const_data_ptr();
  auto& p = problem_of(o, a.scalar_type(), added);
  return cublasLtMatmul(handle(a.get_device()), &p.desc, &one, b.const_data_ptr(), &p.b, a.const_data_ptr(), &p.a, &beta,
                        o.form == kAddend ? added : out.data_ptr(), &p.c, out.data_ptr(), &p.d, &algo, workspace, bytes,
                        c10::cuda::getCurrentCUDAStream(a.get_device()));
}

bool find(const Weight& key, int64_t m, Pinned& found) {
  std::shared_lock lock(table_lock);
  const auto it = table.find(key);
  if (it == table.end()) return false;
  found = it->second[range_of(m)];
  return true;
}

// The product by its pinned algorithm; undefined where the Triton kernel has to compute it.
at::Tensor native(const at::Tensor& a, const at::Tensor& b, const at::Tensor* bias) {
  Operands o;
  if (!readable(a, b, bias, o)) return {};
  const c10::cuda::CUDAGuard guard(a.device());
  const auto key = key_of(a, o);
  Pinned pinned;
  if (!find(key, o.m, pinned)) {
    if (capturing()) return {};  // a proof runs kernels and waits for them
    static const auto prove =
        python<void(const at::Tensor&, const at::Tensor&, int64_t, bool)>("bi_compile_cuda::prove");
    const at::AutoDispatchBelowADInplaceOrView below;
    prove.call(a, b, o.form, o.by_column);
    if (!find(key, o.m, pinned)) return {};
  }
  if (!pinned.native || pinned.triton == kEverywhere || (pinned.triton == kOutsideGraphs && !capturing())) return {};
  auto out = empty(a, {o.m, o.n}, a.scalar_type());
  const auto status = run(out, a, b, bias, o, pinned.algo, nullptr, 0);
  if (status == CUBLAS_STATUS_SUCCESS) return out;
  TORCH_WARN_ONCE("bi_compile: cuBLASLt refuses its pinned algorithm for a product of ", a.sizes(), " by ", b.sizes(),
                  " with strides ", a.strides(), " and ", b.strides(), " (", cublasLtGetStatusString(status),
                  "): the Triton kernel computes such products, with the same bits");
  return {};
}

at::Tensor triton(Recorded& op, torch::jit::Stack arguments) {
  op.call(arguments);
  return std::move(arguments[0]).toTensor();
}

at::Tensor mm(const at::Tensor& a, const at::Tensor& b) {
  auto out = native(a, b, nullptr);
  if (out.defined()) return out;
  static Recorded recorded("mm");
  return triton(recorded, {a, b});
}

at::Tensor addmm(const at::Tensor& bias, const at::Tensor& a, const at::Tensor& b, const at::Scalar& beta,
                 const at::Scalar& alpha) {
  if (beta.equal(1) && alpha.equal(1)) {
    auto out = native(a, b, &bias);
    if (out.defined()) return out;
  }
  static Recorded recorded("addmm");
  return triton(recorded, {bias, a, b, beta, alpha});
}

// ---- for proof.py ----

Operands operands_of(const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& bias) {
  Operands o;
  TORCH_CHECK(readable(a, b, bias ? &*bias : nullptr, o), "cuBLASLt cannot read these operands where they lie");
  return o;
}

cublasLtMatmulAlgo_t algorithm(const at::Tensor& bytes) {
  cublasLtMatmulAlgo_t algo;
  TORCH_CHECK(bytes.device().is_cpu() && bytes.is_contiguous() && bytes.nbytes() == sizeof(algo),
              "an algorithm is ", sizeof(algo), " bytes");
  std::memcpy(&algo, bytes.const_data_ptr(), sizeof(algo));
  return algo;
}

// The algorithms that cuBLASLt's heuristic offers, best first, uint8 [count, 64]. workspace: bytes that they may use;
// 0 leaves only those that take K in one piece.
at::Tensor algorithms(const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& bias,
                      int64_t workspace, int64_t count) {
  const c10::cuda::CUDAGuard guard(a.device());
  const auto o = operands_of(a, b, bias);
  Problem p(o, a.scalar_type(), bias ? bias->const_data_ptr() : nullptr);
  cublasLtMatmulPreferenceOpaque_t preference;
  check(cublasLtMatmulPreferenceInit(&preference), "cublasLtMatmulPreferenceInit");
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
    check(cublasLtMatmulPreferenceSetAttribute(&preference, attribute, &value, sizeof(value)),
          "cublasLtMatmulPreferenceSetAttribute");
  };
  prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(workspace));
  if (workspace == 0) prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_NONE));
  for (const auto side : {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                          CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
    prefer(side, static_cast<uint32_t>(16));
  std::vector<cublasLtMatmulHeuristicResult_t> found(count);
  int returned = 0;
  const auto status = cublasLtMatmulAlgoGetHeuristic(handle(a.get_device()), &p.desc, &p.b, &p.a, &p.c, &p.d, &preference,
                                                     static_cast<int>(count), found.data(), &returned);
  if (status != CUBLAS_STATUS_NOT_SUPPORTED) check(status, "cublasLtMatmulAlgoGetHeuristic");
  auto result = at::empty({returned, static_cast<int64_t>(sizeof(cublasLtMatmulAlgo_t))}, at::kByte);
  for (int i = 0; i < returned; ++i)
    std::memcpy(result.data_ptr<uint8_t>() + i * sizeof(cublasLtMatmulAlgo_t), &found[i].algo, sizeof(found[i].algo));
  return result;
}

template <class T>
int64_t attribute_of(const cublasLtMatmulAlgo_t& algo, cublasLtMatmulAlgoConfigAttributes_t attribute) {
  T value = 0;
  size_t written = 0;
  check(cublasLtMatmulAlgoConfigGetAttribute(&algo, attribute, &value, sizeof(value), &written),
        "cublasLtMatmulAlgoConfigGetAttribute");
  return static_cast<int64_t>(value);
}

// Number, tile, stages, parts of K, reduction scheme, cluster of an algorithm.
std::vector<int64_t> describe(const at::Tensor& bytes) {
  const auto algo = algorithm(bytes);
  return {attribute_of<int32_t>(algo, CUBLASLT_ALGO_CONFIG_ID),
          attribute_of<uint32_t>(algo, CUBLASLT_ALGO_CONFIG_TILE_ID),
          attribute_of<uint32_t>(algo, CUBLASLT_ALGO_CONFIG_STAGES_ID),
          attribute_of<int32_t>(algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM),
          attribute_of<uint32_t>(algo, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME),
          attribute_of<uint16_t>(algo, CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID)};
}

// Fill `out` by this algorithm; false where cuBLASLt refuses it for these operands.
bool run_algorithm(at::Tensor out, const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& bias,
                   const at::Tensor& bytes, const std::optional<at::Tensor>& workspace) {
  const c10::cuda::CUDAGuard guard(a.device());
  const auto o = operands_of(a, b, bias);
  TORCH_CHECK(out.is_contiguous() && out.size(0) == o.m && out.size(1) == o.n, "out is contiguous, [M, N]");
  const auto status = run(out, a, b, bias ? &*bias : nullptr, o, algorithm(bytes),
                          workspace ? workspace->data_ptr() : nullptr, workspace ? workspace->nbytes() : 0);
  return status == CUBLAS_STATUS_SUCCESS;
}

// Pin for products like this one: an algorithm (or an empty tensor: the Triton kernel) for each range of heights, and where the Triton
// kernel is taken all the same, a `Triton`.
void pin(const at::Tensor& a, const at::Tensor& b, int64_t form, const std::vector<at::Tensor>& algos,
         const std::vector<int64_t>& triton) {
  TORCH_CHECK(algos.size() == kRanges && triton.size() == kRanges, "one algorithm for each range of heights");
  auto o = operands_of(a, b, std::nullopt);
  o.form = static_cast<Form>(form);
  std::array<Pinned, kRanges> row;
  for (size_t i = 0; i < kRanges; ++i) {
    row[i].native = algos[i].numel() != 0;
    row[i].triton = static_cast<Triton>(triton[i]);
    if (row[i].native) row[i].algo = algorithm(algos[i]);
  }
  std::unique_lock lock(table_lock);
  table[key_of(a, o)] = row;
}

void forget() {
  std::unique_lock lock(table_lock);
  table.clear();
}

std::vector<int64_t> heights() { return {kHeights.begin(), kHeights.end()}; }
int64_t library_version() { return static_cast<int64_t>(cublasLtGetVersion()); }

int64_t driver_version() {
  int version = 0;
  C10_CUDA_CHECK(cudaDriverGetVersion(&version));
  return version;
}

}  // namespace
}  // namespace bi_compile

TORCH_LIBRARY(bi_compile_cuda, m) {
  using namespace bi_compile;
  m.def("prove(Tensor a, Tensor b, int form, bool by_column) -> ()");
  m.def("algorithms(Tensor a, Tensor b, Tensor? bias, int workspace, int count) -> Tensor", &algorithms);
  m.def("describe(Tensor algo) -> int[]", &describe);
  m.def("run_algorithm(Tensor(a!) out, Tensor a, Tensor b, Tensor? bias, Tensor algo, Tensor? workspace) -> bool",
        &run_algorithm);
  m.def("pin(Tensor a, Tensor b, int form, Tensor[] algos, int[] triton) -> ()", &pin);
  m.def("forget_products() -> ()", &forget);
  m.def("heights() -> int[]", &heights);
  m.def("library_version() -> int", &library_version);
  m.def("driver_version() -> int", &driver_version);
}

TORCH_LIBRARY_IMPL(bi_compile, CUDA, m) {
  m.impl("mm", &bi_compile::mm);
  m.impl("addmm", &bi_compile::addmm);
}
