// Which engine serves this CPU: the widest instruction set that it has, or ADACOMCAT_CPU.
#include "engine.h"

#include <ATen/Context.h>
#include <c10/util/Exception.h>
#include <torch/version.h>

#include <atomic>
#include <cstdlib>
#include <string>
#include <string_view>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ADACOMCAT_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace adacomcat {

namespace generic {
extern const Engine kEngine;
}
#ifdef ADACOMCAT_X86
namespace avx2 {
extern const Engine kEngine;
}
namespace avx512 {
extern const Engine kEngine;
}
namespace avx512_bf16 {
extern const Engine kEngine;
}
namespace avx512_vnni {
extern const Engine kReduced, kEngine;
}
namespace amx {
extern const Engine kEngine;
}
namespace amx_split {
extern const Engine kEngine;
}
#endif

namespace {

struct InstructionSet {
  const char* name;
  bool present;
  const Engine* full;     // float32, and what has no engine of its own
  const Engine* reduced;  // float32 where torch.set_float32_matmul_precision allows less
  const Engine* bf16;
  const Engine* bf16_activations;
};

#ifdef ADACOMCAT_X86
// Whether this CPU has AMX for bfloat16, and Linux lets this process use its tile registers.
bool amx_allowed() {
#ifdef __linux__
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl
  return (d & kAmxBf16) && (d & kAmxTile) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

InstructionSet one_for_all(const char* name, bool present, const Engine& engine) {
  return {name, present, &engine, &engine, &engine, &engine};
}

const InstructionSet* instruction_sets(size_t& count) {
#ifdef ADACOMCAT_X86
  __builtin_cpu_init();
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                             __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  static const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  const Engine* const reduced = vnni ? &avx512_vnni::kReduced : &avx512::kEngine;
  const InstructionSet with_bf16{"avx512_bf16", bf16, &avx512::kEngine, reduced,
                                 &avx512_bf16::kEngine, &avx512_bf16::kEngine};
  const InstructionSet with_vnni{"avx512_vnni", vnni, &avx512::kEngine, reduced,
                                 &avx512_vnni::kEngine, &avx512::kEngine};
  // Intel's multiply bfloat16 outside AMX at half the rate of floats, AMD's at twice.
  static const bool slow_bf16 = __builtin_cpu_is("intel");
  static const InstructionSet sets[] = {
      {"amx", bf16 && amx_allowed(), &amx_split::kEngine, &amx_split::kEngine, &amx::kEngine,
       &amx::kEngine},
      slow_bf16 ? with_vnni : with_bf16,
      slow_bf16 ? with_bf16 : with_vnni,
      one_for_all("avx512", avx512, avx512::kEngine),
      one_for_all("avx2", avx2, avx2::kEngine),
      one_for_all("generic", true, generic::kEngine),
  };
#else
  static const InstructionSet sets[] = {one_for_all("generic", true, generic::kEngine)};
#endif
  count = sizeof sets / sizeof sets[0];
  return sets;
}

const InstructionSet* find(const char* name, bool emulated = false) {
  size_t count;
  const InstructionSet* sets = instruction_sets(count);
  for (size_t i = 0; i < count; ++i) {
    const bool runs = sets[i].present || emulated;
    if (runs && (!name || std::string(name) == sets[i].name)) return &sets[i];
  }
  return nullptr;
}

std::atomic<const InstructionSet*>& chosen() {
  static std::atomic<const InstructionSet*> set = [] {
    const char* wish = std::getenv("ADACOMCAT_CPU");
    const InstructionSet* found = find(wish && *wish ? wish : nullptr);
    TORCH_CHECK(found, "ADACOMCAT_CPU=", wish, " is not an instruction set of this CPU; it has ",
                find(nullptr)->name, " and what comes before: amx, avx512_vnni, avx512_bf16, avx512, avx2, generic");
    return found;
  }();
  return set;
}

// Whether float32 products may lose precision; torch before 2.14 is not asked.
bool precision_reduced() {
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 14
  const auto precision = at::globalContext().float32Precision(at::Float32Backend::MKLDNN,
                                                              at::Float32Op::MATMUL);
  return precision == at::Float32Precision::TF32 || precision == at::Float32Precision::BF16;
#else
  return false;
#endif
}

}  // namespace

const Engine& engine(Dtype dtype) {
  const InstructionSet* set = chosen().load(std::memory_order_relaxed);
  if (dtype == Dtype::bf16) return *set->bf16;
  return dtype == Dtype::f32 && precision_reduced() ? *set->reduced : *set->full;
}

const Engine& activation_engine(Dtype dtype) {
  const InstructionSet* set = chosen().load(std::memory_order_relaxed);
  return dtype == Dtype::bf16 ? *set->bf16_activations : *set->full;
}

const char* instruction_set() { return chosen().load()->name; }

bool has_avx512() {
  const std::string_view name = instruction_set();
  return name != "generic" && name != "avx2";
}

bool use_instruction_set(const char* name, bool emulated) {
  const InstructionSet* set = find(name, emulated);
  if (set) chosen().store(set);
  return set != nullptr;
}

}  // namespace adacomcat
