// adacomcat._C: how the extension was built, and what the CPU offers. Importing it registers the kernels
// of the other files with PyTorch.
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include "cpu/gemm/engine.h"
#include "cpu/isa.h"
#include "cpu/runtime/cores.h"
#include "cpu/runtime/scratch.h"
#include "cpu/threads.h"
#ifdef ADACOMCAT_CUDA
#include "cuda/kernels.h"
#endif

namespace py = pybind11;

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

#ifdef ADACOMCAT_CUDA
constexpr bool kCuda = true;
#else
constexpr bool kCuda = false;
#endif

py::dict cpu_features() {
  py::dict features;
#if defined(__x86_64__) && defined(__GNUC__)
  features["avx2"] = static_cast<bool>(__builtin_cpu_supports("avx2"));
  features["fma"] = static_cast<bool>(__builtin_cpu_supports("fma"));
  features["avx512f"] = static_cast<bool>(__builtin_cpu_supports("avx512f"));
  features["avx512vnni"] = static_cast<bool>(__builtin_cpu_supports("avx512vnni"));
  features["avx512bf16"] = static_cast<bool>(__builtin_cpu_supports("avx512bf16"));
#endif
  return features;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = kCompiler;
  info["torch"] = TORCH_VERSION;
  info["cuda"] = kCuda;
  info["instruction_set"] = adacomcat::instruction_set().name;
  info["cpu_features"] = cpu_features();
  return info;
}

py::dict cores() {
  py::dict found;
  found["affinity"] = adacomcat::affinity_cores();
  found["quota"] = adacomcat::quota_cores();
  found["threads"] = adacomcat::thread_count();
  return found;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info, "Compiler, torch, CUDA and CPU.");
  m.def("use_instruction_set", &adacomcat::use_instruction_set, py::arg("name"),
        py::arg("emulated") = false,
        "Run the CPU kernels on an instruction set; False where this CPU lacks it, unless its "
        "instructions are emulated.");
  m.def("reduce_float32", &adacomcat::reduce_float32, py::arg("reduce"),
        "Whether products of float32 may lose digits from now on, in the whole process.");
  m.def("cores", &cores,
        "Cores that affinity and control groups allow (quota 0: no limit), and threads of an op.");
  m.def("quota_cores", &adacomcat::quota_cores, py::arg("root"),
        "The quota of the control groups whose files lie below a folder.");
  m.def("scratch_bytes", &adacomcat::scratch_bytes,
        "Memory that the CPU kernels hold beside tensors, of all threads.");
#ifdef ADACOMCAT_CUDA
  m.def("svd_shared_memory", &adacomcat::cuda::svd_shared_memory,
        "Bytes that a (rows, columns) matrix of an element size takes of a block's shared memory.");
#endif
}
