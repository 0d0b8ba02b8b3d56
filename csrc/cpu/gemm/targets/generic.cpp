// Any CPU: vectors of four floats, which the compiler maps to SSE or NEON.
#include "cpu/gemm/targets/prelude.h"

namespace adacomcat::generic {
constexpr int kLanes = 4, kTileRows = 6, kRowStep = kTileRows;
#include "cpu/gemm/engine-inl.h"
}  // namespace adacomcat::generic

const adacomcat::Engine adacomcat::kGeneric = generic::make_engine("generic");
