// AMX: products of tiles of bfloat16 pairs with fp32 sums; all else is AVX-512.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <c10/util/Half.h>
#include <immintrin.h>

#include "engine.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,fma,f16c,prefer-vector-width=512")
#define ADACOMCAT_AVX512
#define ADACOMCAT_BF16_DOT
#define ADACOMCAT_16_BITS
#define ADACOMCAT_AMX

namespace adacomcat {
namespace amx {
namespace {
constexpr int kLanes = 16, kTileRows = 32, kRowStep = 16, kPanel = 2;
#include "engine_body.h"
}  // namespace

extern const Engine kEngine;
const Engine kEngine{"amx", kOperand, kTileRows, kRowStep, kBlockRows, kLanes, kGroup, kDepth,
                     kPackedSize, kScaleRows, pack, multiply, accumulate, load_rows, normalize_rows, softmax_rows,
                     inner_products, weighted_sums, begin, end};
}  // namespace amx
}  // namespace adacomcat
#endif
