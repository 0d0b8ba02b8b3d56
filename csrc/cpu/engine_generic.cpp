// Any CPU: vectors of four floats, which compilers map to SSE or NEON.
#include <c10/util/Half.h>

#include "engine.h"

namespace adacomcat {
namespace generic {
namespace {
constexpr int kLanes = 4, kTileRows = 6, kRowStep = kTileRows, kPanel = 2;
#include "engine_body.h"
}  // namespace

extern const Engine kEngine;
const Engine kEngine{"generic", kOperand, kTileRows, kRowStep, kBlockRows, kLanes, kGroup, kDepth,
                     kPackedSize, kScaleRows, pack, multiply, accumulate, load_rows, normalize_rows, softmax_rows,
                     inner_products, weighted_sums, begin, end};
}  // namespace generic
}  // namespace adacomcat
