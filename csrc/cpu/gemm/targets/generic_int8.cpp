// Any CPU, products of 8-bit integers.
#include "cpu/gemm/targets/prelude.h"

#define ADACOMCAT_INT8_PRODUCTS
#define ADACOMCAT_16_BIT_ACTIVATIONS

namespace adacomcat::generic_int8 {
constexpr int kLanes = 4, kTileRows = 6, kRowStep = kTileRows;
#include "cpu/gemm/engine-inl.h"
}  // namespace adacomcat::generic_int8

const adacomcat::Engine adacomcat::kGenericInt8 = generic_int8::make_engine("generic_int8");
