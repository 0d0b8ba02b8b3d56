// One engine: what a file in gemm/targets compiles for its instruction set. Every -inl.h is included
// here, once for each engine, inside the target's own namespace: no symbol may be shared between two
// instruction sets, and none has an include guard.
//
// Before it, the target defines
//   kLanes               floats in a vector,
//   kTileRows, kRowStep  rows of a full tile of C, and rows that cost as much as fewer,
// and macros for what it has: ADACOMCAT_AVX2, ADACOMCAT_AVX512 (some compilers do not define
// __AVX512F__ after a pragma), ADACOMCAT_AMX; for its products: ADACOMCAT_BF16_OPERANDS,
// ADACOMCAT_INT16_PRODUCTS, ADACOMCAT_INT8_PRODUCTS (with ADACOMCAT_BYTE_DOT where one instruction sums
// up four products), ADACOMCAT_BF16X3_PRODUCTS, by default float32; and ADACOMCAT_16_BIT_ACTIVATIONS if
// GELU and softmax need no more accuracy than bfloat16 has.

#if defined(ADACOMCAT_INT16_PRODUCTS) || defined(ADACOMCAT_INT8_PRODUCTS)
#define ADACOMCAT_INTEGER_PRODUCTS
#endif

namespace {

#include "cpu/gemm/vector-inl.h"
#include "cpu/gemm/activation-inl.h"
#include "cpu/gemm/blocking-inl.h"
#include "cpu/gemm/epilogue-inl.h"
#ifdef ADACOMCAT_AMX
#include "cpu/gemm/amx-inl.h"
#endif
#if defined(ADACOMCAT_BF16X3_PRODUCTS)
#include "cpu/gemm/microkernel_amx_bf16x3-inl.h"
#elif defined(ADACOMCAT_AMX)
#include "cpu/gemm/microkernel_amx-inl.h"
#else
#include "cpu/gemm/microkernel-inl.h"
#endif
#include "cpu/gemm/gemm-inl.h"
#if defined(ADACOMCAT_BF16X3_PRODUCTS)
#include "cpu/gemm/pack_bf16x3-inl.h"
#elif defined(ADACOMCAT_INT8_PRODUCTS)
#include "cpu/gemm/pack_int8-inl.h"
#elif defined(ADACOMCAT_INT16_PRODUCTS)
#include "cpu/gemm/pack_int16-inl.h"
#else
#include "cpu/gemm/pack-inl.h"
#endif
#include "cpu/gemm/rows-inl.h"
#include "cpu/gemm/rotary-inl.h"
#include "cpu/gemm/gemv-inl.h"

constexpr Engine make_engine(const char* name) {
  return {
      .name = name,
      .operand = kOperand,
      .tile_rows = kTileRows,
      .row_step = kRowStep,
      .block_rows = kBlockRows,
      .lanes = kLanes,
      .k_group = kGroup,
      .k_multiple = kKMultiple,
      .packed_size = kPackedSize,
      .packed_group = kPackedGroup,
      .packed_zero = kPackedZero,
      .scale_rows = kScaleRows,
      .pack = pack,
      .multiply = multiply,
      .accumulate = accumulate,
      .load = load_rows,
      .normalize = normalize_rows,
      .softmax = softmax_rows,
      .rotate = rotate_rows,
      .inner_products = inner_products,
      .weighted_sums = weighted_sums,
      .begin = begin,
      .end = end,
  };
}

}  // namespace
