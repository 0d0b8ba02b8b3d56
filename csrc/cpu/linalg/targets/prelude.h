// What a file in linalg/targets includes before it selects its instruction set. Anything included after
// that is compiled for the instruction set; a shared inline function could then run, and fault, on a
// CPU without it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <type_traits>
#include <utility>

#include "cpu/isa.h"
#include "cpu/linalg/kernels.h"
