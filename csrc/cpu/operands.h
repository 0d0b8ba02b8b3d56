// What an engine's products work on: their left operand, packed B, and the blocks that fit into caches.

#ifdef ADACOMCAT_BF16_DOT
constexpr int kGroup = 2;
constexpr Dtype kOperand = Dtype::bf16;
constexpr int kOperandSize = 2;
#else
constexpr int kGroup = 1;
constexpr Dtype kOperand = Dtype::f32;
constexpr int kOperandSize = 4;
#endif
constexpr int kStep = kGroup * kOperandSize;  // bytes of one lane of A
#if defined(ADACOMCAT_AMX)
constexpr int kDepth = 32;  // rows of B that a tile register holds: their number is padded to it
#elif defined(ADACOMCAT_INTEGERS)
constexpr int kDepth = 2;
#else
constexpr int kDepth = kGroup;
#endif
#if defined(ADACOMCAT_AMX_SPLIT)
constexpr int kPackedSize = 6;  // of a float in three parts
constexpr int64_t kSpanBytes = 5 << 17;  // the less, the more often rows are split
#elif defined(ADACOMCAT_INTEGERS)
constexpr int kPackedSize = 2;
constexpr int64_t kSpanBytes = 1 << 20;
#else
constexpr int kPackedSize = kOperandSize;
constexpr int64_t kSpanBytes = 1 << 20;
#endif
#ifdef ADACOMCAT_INTEGERS
constexpr int kScaleRows = 2;  // of 16 bits: a float for each column
#else
constexpr int kScaleRows = 0;
#endif

#ifdef ADACOMCAT_AMX
constexpr int64_t kBlockRows = 400;  // the fewer, the more often all weights come from the third cache
#else
constexpr int64_t kBlockRows = 264;  // an image of 224 by 224 is one block, and meets each weight once
#endif
