// AVX-512: 32 registers of sixteen floats hold a tile of 12 by 32.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <c10/util/Half.h>
#include <immintrin.h>

#include "engine.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512")
#define ADACOMCAT_AVX512

namespace adacomcat {
namespace avx512 {
namespace {
constexpr int kLanes = 16, kTileRows = 12, kRowStep = kTileRows, kPanel = 2;
#include "engine_body.h"
}  // namespace

extern const Engine kEngine;
const Engine kEngine{"avx512", kOperand, kTileRows, kRowStep, kBlockRows, kLanes, kGroup, kDepth,
                     kPackedSize, kScaleRows, pack, multiply, accumulate, load_rows, normalize_rows, softmax_rows,
                     inner_products, weighted_sums, begin, end};
}  // namespace avx512
}  // namespace adacomcat
#endif
