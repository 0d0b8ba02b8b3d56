// Which instruction set the CPU kernels run on. Products (gemm) and decompositions (linalg) both ask
// here, and nowhere else.
#pragma once

#include <cstdint>

// The x86 targets are compiled with `#pragma GCC target`, which clang does not have.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ADACOMCAT_X86
#endif

namespace adacomcat {

struct Engine;         // gemm/engine.h
struct LinalgKernels;  // linalg/kernels.h

// What gemm/targets and linalg/targets define, each in the file of its name.
extern const Engine kGeneric, kAvx2, kAvx512, kAvx512Bf16, kAvx512Vnni, kAvx512VnniFloat, kAmx,
    kAmxBf16x3,
    kGenericInt8, kAvx2Int8, kAvxVnniInt8, kAvx512Int8, kAvx512VnniInt8;
extern const LinalgKernels kGenericLinalg, kAvx2Linalg, kAvx512Linalg;

struct InstructionSet {
  const char* name;
  bool present;  // this CPU has it, and the system allows it
  const LinalgKernels* linalg;
  const Engine* full;              // for float32, and for all that has no engine of its own
  const Engine* reduced;           // for float32 if torch.set_float32_matmul_precision allows less
  const Engine* bf16;              // for products of bfloat16 with weights
  const Engine* bf16_activations;  // for products of bfloat16 activations with each other
  const Engine* int8;              // for products with weights of 8 bits
};

// The fastest one of this CPU, unless ADACOMCAT_CPU or use_instruction_set() names another: "generic",
// "avx2", "avx_vnni", "avx512", "avx512_bf16", "avx512_vnni" or "amx".
const InstructionSet& instruction_set();

// The engine with this number among those of the instruction set that is chosen; null if it has none such.
const Engine* engine_at(int64_t index);
int64_t index_of(const Engine& engine);

// Chooses one by name, for tests. False if this CPU lacks it and its instructions are not emulated.
bool use_instruction_set(const char* name, bool emulated = false);

}  // namespace adacomcat
