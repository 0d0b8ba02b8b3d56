// AVX2 and FMA: 16 registers of eight floats hold a tile of 6 by 16.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <c10/util/Half.h>
#include <immintrin.h>

#include "engine.h"

#pragma GCC target("avx2,fma,f16c")
#define ADACOMCAT_AVX2

namespace adacomcat {
namespace avx2 {
namespace {
constexpr int kLanes = 8, kTileRows = 6, kRowStep = kTileRows, kPanel = 2;
#include "engine_body.h"
}  // namespace

extern const Engine kEngine;
const Engine kEngine{"avx2", kOperand, kTileRows, kRowStep, kBlockRows, kLanes, kGroup, kDepth,
                     kPackedSize, kScaleRows, pack, multiply, accumulate, load_rows, normalize_rows, softmax_rows,
                     inner_products, weighted_sums, begin, end};
}  // namespace avx2
}  // namespace adacomcat
#endif
