// AVX-512 VNNI: products of integers of 16 bits, of which a row shares a scale. Instead of bfloat16, and of
// float32 where PyTorch's user allows less precision; that engine has activations as exact as others.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <c10/util/Half.h>
#include <immintrin.h>

#include "engine.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c,prefer-vector-width=512")
#define ADACOMCAT_AVX512
#define ADACOMCAT_INTEGERS

namespace adacomcat {
namespace avx512_vnni {
namespace {
constexpr int kLanes = 16, kTileRows = 12, kRowStep = kTileRows, kPanel = 2;
namespace reduced {
#include "engine_body.h"
}
#define ADACOMCAT_16_BITS
namespace bf16 {
#include "engine_body.h"
}
}  // namespace

extern const Engine kReduced, kEngine;
#define ADACOMCAT_ENGINE(body)                                                                       \
  {                                                                                                  \
    "avx512_vnni", body::kOperand, kTileRows, kRowStep, body::kBlockRows, kLanes, body::kGroup,      \
        body::kDepth, body::kPackedSize, body::kScaleRows, body::pack, body::multiply,               \
        body::accumulate, body::load_rows, body::normalize_rows, body::softmax_rows,                 \
        body::inner_products, body::weighted_sums, body::begin, body::end                            \
  }
const Engine kReduced ADACOMCAT_ENGINE(reduced);
const Engine kEngine ADACOMCAT_ENGINE(bf16);
}  // namespace avx512_vnni
}  // namespace adacomcat
#endif
