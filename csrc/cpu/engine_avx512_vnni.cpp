// AVX-512 VNNI: products of integers of 16 bits, of which a row shares a scale, instead of bfloat16.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <c10/util/Half.h>
#include <immintrin.h>

#include "engine.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c,prefer-vector-width=512")
#define ADACOMCAT_AVX512
#define ADACOMCAT_INTEGERS
#define ADACOMCAT_16_BITS

namespace adacomcat {
namespace avx512_vnni {
namespace {
constexpr int kLanes = 16, kTileRows = 12, kRowStep = kTileRows, kPanel = 2;
#include "engine_body.h"
}  // namespace

extern const Engine kEngine;
const Engine kEngine{"avx512_vnni", kOperand, kTileRows, kRowStep, kBlockRows, kLanes, kGroup, kDepth,
                     kPackedSize, kScaleRows, pack, multiply, accumulate, load_rows, normalize_rows, softmax_rows,
                     inner_products, weighted_sums, begin, end};
}  // namespace avx512_vnni
}  // namespace adacomcat
#endif
