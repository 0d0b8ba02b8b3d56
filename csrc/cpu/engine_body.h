// One engine. Before including this, an engine_*.cpp includes <c10/util/Half.h> and "engine.h",
// selects its target and defines ADACOMCAT_AVX2 or ADACOMCAT_AVX512 (after a pragma some compilers do
// not define __AVX512F__), kLanes, kTileRows, kRowStep and kPanel.

// std::integer_sequence would be shared between instruction sets; this is not.
template <int... I>
struct Sequence {};
template <int N, int... I>
struct MakeSequence : MakeSequence<N - 1, N - 1, I...> {};
template <int... I>
struct MakeSequence<0, I...> {
  using type = Sequence<I...>;
};

#include "vector.h"
#include "product.h"
#if defined(ADACOMCAT_AMX_SPLIT)
#include "pack_split.h"
#elif defined(ADACOMCAT_INTEGERS)
#include "pack_integers.h"
#else
#include "pack.h"
#endif
#include "rows.h"
