#include "cpu/isa.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#ifdef ADACOMCAT_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace adacomcat {

namespace {

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

#ifdef ADACOMCAT_X86
// Whether this CPU has VNNI for vectors of 256 bits.
bool has_avx_vnni() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
}
#endif

// The fastest first. Each row: name, present, linalg; engines: full, reduced, bf16, bf16_activations,
// int8.
std::vector<InstructionSet> detect() {
  std::vector<InstructionSet> sets;
#ifdef ADACOMCAT_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  const Engine* const reduced = vnni ? &kAvx512VnniFloat : &kAvx512;
  const Engine* const int8 = vnni ? &kAvx512VnniInt8 : &kAvx512Int8;
  const auto* const linalg = &kAvx512Linalg;
  const InstructionSet with_bf16{"avx512_bf16", bf16,         linalg,       &kAvx512,
                                 reduced,       &kAvx512Bf16, &kAvx512Bf16, int8};
  const InstructionSet with_vnni{"avx512_vnni", vnni,         linalg,   &kAvx512,
                                 reduced,       &kAvx512Vnni, &kAvx512, int8};
  // Outside AMX, Intel's CPUs multiply bfloat16 at half the rate of float32, AMD's at twice the rate.
  const bool slow_bf16 = __builtin_cpu_is("intel");
  sets.push_back(
      {"amx", bf16 && amx_allowed(), linalg, &kAmxBf16x3, &kAmxBf16x3, &kAmx, &kAmx, int8});
  sets.push_back(slow_bf16 ? with_vnni : with_bf16);
  sets.push_back(slow_bf16 ? with_bf16 : with_vnni);
  sets.push_back({"avx512", avx512, linalg, &kAvx512, &kAvx512, &kAvx512, &kAvx512, &kAvx512Int8});
  const auto* const avx2_linalg = &kAvx2Linalg;
  sets.push_back({"avx_vnni", avx2 && has_avx_vnni(), avx2_linalg, &kAvx2, &kAvx2, &kAvx2, &kAvx2,
                  &kAvxVnniInt8});
  sets.push_back({"avx2", avx2, avx2_linalg, &kAvx2, &kAvx2, &kAvx2, &kAvx2, &kAvx2Int8});
#endif
  sets.push_back({"generic", true, &kGenericLinalg, &kGeneric, &kGeneric, &kGeneric, &kGeneric,
                  &kGenericInt8});
  return sets;
}

// The first one that runs, of this name if there is one.
const InstructionSet* find(const char* name, bool emulated = false) {
  static const std::vector<InstructionSet> sets = detect();
  for (const InstructionSet& set : sets) {
    const bool runs = set.present || emulated;
    if (runs && (!name || std::string_view(name) == set.name)) return &set;
  }
  return nullptr;
}

std::atomic<const InstructionSet*>& chosen() {
  static std::atomic<const InstructionSet*> set = [] {
    const char* wish = std::getenv("ADACOMCAT_CPU");
    const InstructionSet* found = find(wish && *wish ? wish : nullptr);
    if (!found) {
      throw std::runtime_error(
          "ADACOMCAT_CPU=" + std::string(wish) +
          " is not an instruction set of this CPU; its best is " + find(nullptr)->name +
          " of amx, avx512_vnni, avx512_bf16, avx512, avx_vnni, avx2, generic");
    }
    return found;
  }();
  return set;
}

// Every engine of this build, in an order that stays: packed weights name theirs by its place.
const std::vector<const Engine*>& engines() {
  static const std::vector<const Engine*> all = {
      &kGeneric,   &kGenericInt8,
#ifdef ADACOMCAT_X86
      &kAvx2,      &kAvx512,      &kAvx512Bf16,  &kAvx512Vnni, &kAvx512VnniFloat, &kAmx,
      &kAmxBf16x3, &kAvx2Int8,    &kAvxVnniInt8, &kAvx512Int8, &kAvx512VnniInt8,
#endif
  };
  return all;
}

}  // namespace

const Engine* engine_at(int64_t index) {
  if (index < 0 || index >= static_cast<int64_t>(engines().size())) return nullptr;
  const Engine* const engine = engines()[index];
  const InstructionSet& set = instruction_set();
  const bool runs =
      engine == set.full || engine == set.reduced || engine == set.bf16 || engine == set.int8;
  return runs ? engine : nullptr;
}

int64_t index_of(const Engine& engine) {
  const auto& all = engines();
  return std::find(all.begin(), all.end(), &engine) - all.begin();
}

const InstructionSet& instruction_set() { return *chosen().load(std::memory_order_relaxed); }

bool use_instruction_set(const char* name, bool emulated) {
  const InstructionSet* set = find(name, emulated);
  if (set) chosen().store(set);
  return set != nullptr;
}

}  // namespace adacomcat
