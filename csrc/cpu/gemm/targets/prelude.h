// What a file in gemm/targets includes before it selects its instruction set. Anything included after
// that is compiled for the instruction set; a shared inline function could then run, and fault, on a
// CPU without it.
#pragma once

#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <utility>

#include "cpu/gemm/engine.h"
#include "cpu/isa.h"
#ifdef ADACOMCAT_X86
#include <immintrin.h>
#endif
