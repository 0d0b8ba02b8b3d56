// AMX for CPUs without it: a handler of SIGILL decodes the tile instruction that trapped, does what
// Intel's manual (Software Developer's Manual, volume 2) says of it, and goes on behind it. So tests
// run the machine code that is shipped; a use of tiles that the manual forbids ends the process.
#include <immintrin.h>
#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace {

constexpr int kTiles = 8, kMostRows = 16, kRowBytes = 64;
typedef float Row __attribute__((vector_size(kRowBytes)));

[[noreturn]] void refuse(const char* why) {
  fprintf(stderr, "amx_emulator: %s\n", why);
  abort();
}

void require(bool condition, const char* otherwise) {
  if (!condition) refuse(otherwise);
}

struct Tile {
  int rows, row_bytes;  // none where it is not configured
  alignas(kRowBytes) uint8_t data[kMostRows][kRowBytes];

  float* floats(int row) { return reinterpret_cast<float*>(data[row]); }
  const uint16_t* halves(int row) const { return reinterpret_cast<const uint16_t*>(data[row]); }
};

struct Registers {
  bool configured;
  Tile tiles[kTiles];
};
thread_local Registers registers;

Tile& tile(int number) {
  require(registers.configured, "no tiles are configured");
  require(number < kTiles && registers.tiles[number].rows, "a tile that has no rows");
  return registers.tiles[number];
}

struct Instruction {
  int prefix, opcode;     // prefix: 0 none, 1 66, 2 F3, 3 F2
  int first, second, third;  // ModRM.reg, ModRM.rm, VEX.vvvv
  bool memory;
  char* address;  // base + displacement
  int64_t stride;  // index · scale
  int length;
};

int64_t value(const ucontext_t* context, int number) {
  static constexpr int kNames[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                     REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                     REG_R12, REG_R13, REG_R14, REG_R15};
  return context->uc_mcontext.gregs[kNames[number]];
}

// The bits that a prefix adds to the numbers of registers.
struct Extensions {
  int reg, index, base;
};

// Reads the memory operand that follows `code`'s opcode: its address and stride, and how long the
// instruction is.
void decode_address(const ucontext_t* context, const uint8_t* code, const Extensions& extend,
                    Instruction& out) {
  const int mode = code[4] >> 6, low = code[4] & 7;
  int64_t base = 0;
  bool wide = mode == 2;
  if (low == 4) {
    const int sib = code[out.length++], index = (sib >> 3 & 7) + extend.index;
    const bool no_base = mode == 0 && (sib & 7) == 5;
    if (index != 4) out.stride = value(context, index) << (sib >> 6);
    wide |= no_base;
    if (!no_base) base = value(context, (sib & 7) + extend.base);
  } else if (mode == 0 && low == 5) {  // relative to the next instruction
    wide = true;
    base = reinterpret_cast<int64_t>(code) + out.length + 4;
  } else {
    base = value(context, out.second);
  }
  if (wide) {
    int32_t displacement;
    memcpy(&displacement, code + out.length, 4);
    base += displacement, out.length += 4;
  } else if (mode == 1) {
    base += static_cast<int8_t>(code[out.length++]);
  }
  out.address = reinterpret_cast<char*>(base);
}

// A VEX.128.0F38.W0 instruction; false where it is something else.
bool decode(const ucontext_t* context, Instruction& out) {
  const auto* code = reinterpret_cast<const uint8_t*>(context->uc_mcontext.gregs[REG_RIP]);
  if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x84)) return false;
  const Extensions extend{code[1] & 0x80 ? 0 : 8, code[1] & 0x40 ? 0 : 8, code[1] & 0x20 ? 0 : 8};
  out = {};
  out.prefix = code[2] & 3, out.third = ~(code[2] >> 3) & 15, out.opcode = code[3];
  out.first = (code[4] >> 3 & 7) + extend.reg, out.second = (code[4] & 7) + extend.base;
  out.memory = code[4] >> 6 != 3, out.length = 5;
  if (out.memory) decode_address(context, code, extend, out);
  return true;
}

void configure(const char* from) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(from);
  registers = {};
  if (!bytes[0]) return;
  require(bytes[0] == 1 && !bytes[1], "a palette other than 1, or a start row");
  for (int i = 0; i < kMostRows; ++i) {
    uint16_t row_bytes;
    memcpy(&row_bytes, from + 16 + 2 * i, 2);
    const int rows = bytes[48 + i];
    if (i >= kTiles) {
      require(!row_bytes && !rows, "a tile beyond the eighth");
      continue;
    }
    require(rows <= kMostRows && row_bytes <= kRowBytes && !rows == !row_bytes,
            "a tile of more than 16 rows of 64 bytes, or of half a size");
    registers.tiles[i].rows = rows, registers.tiles[i].row_bytes = row_bytes;
  }
  for (int i = 2; i < 16; ++i) require(!bytes[i], "reserved bytes of the configuration");
  registers.configured = true;
}

void load(Tile& to, const Instruction& from) {
  memset(to.data, 0, sizeof to.data);
  for (int i = 0; i < to.rows; ++i) memcpy(to.data[i], from.address + i * from.stride, to.row_bytes);
}

void store(const Tile& from, const Instruction& to) {
  for (int i = 0; i < from.rows; ++i) memcpy(to.address + i * to.stride, from.data[i], from.row_bytes);
}

float widen(uint16_t x) {
  const uint32_t bits = uint32_t{x} << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}

// Sums of even and of odd products, added to each other and then to C. Denormals count as zero.
void multiply(Tile& c, const Tile& a, const Tile& b) {
  require(&c != &a && &c != &b && &a != &b, "a product of a tile with itself");
  require(c.rows == a.rows && c.row_bytes == b.row_bytes && a.row_bytes == 4 * b.rows,
          "a product of tiles whose sizes do not fit");
  _mm_setcsr(0x9fc0);
  Row even_b[kMostRows], odd_b[kMostRows];
  for (int k = 0; k < b.rows; ++k) {
    for (int n = 0; n < kMostRows; ++n) {
      even_b[k][n] = widen(b.halves(k)[2 * n]), odd_b[k][n] = widen(b.halves(k)[2 * n + 1]);
    }
  }
  for (int m = 0; m < c.rows; ++m) {
    Row even{}, odd{};
    for (int k = 0; k < b.rows; ++k) {
      even += widen(a.halves(m)[2 * k]) * even_b[k];
      odd += widen(a.halves(m)[2 * k + 1]) * odd_b[k];
    }
    const Row sum = even + odd;
    for (int n = 0; n < c.row_bytes / 4; ++n) c.floats(m)[n] += sum[n];
  }
}

// False where it is no instruction of AMX.
bool execute(const Instruction& i) {
  enum { kConfigure = 0x049, kZero = 0x349, kLoad = 0x34b, kStore = 0x24b, kMultiply = 0x25c };
  switch (i.prefix << 8 | i.opcode) {
    case kConfigure:
      if (i.memory) {
        configure(i.address);
      } else {
        registers = {};  // tilerelease
      }
      return true;
    case kZero:
      memset(tile(i.first).data, 0, sizeof(Tile::data));
      return true;
    case kLoad:
      load(tile(i.first), i);
      return true;
    case kStore:
      store(tile(i.first), i);
      return true;
    case kMultiply:
      multiply(tile(i.first), tile(i.second), tile(i.third));
      return true;
  }
  return false;
}

struct sigaction before;

void handle(int, siginfo_t*, void* where) {
  auto* context = static_cast<ucontext_t*>(where);
  Instruction instruction;
  if (!decode(context, instruction) || !execute(instruction)) {
    sigaction(SIGILL, &before, nullptr);  // it traps once more, into what was there
    return;
  }
  context->uc_mcontext.gregs[REG_RIP] += instruction.length;
}

sigjmp_buf probing;

void stop_probing(int) { siglongjmp(probing, 1); }

}  // namespace

// From now on AMX is computed here, in all threads.
extern "C" void install() {
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, &action, &before);
}

// Whether this thread has tiles configured, here or in its own AMX.
extern "C" int tiles_configured() {
  constexpr int kTileData = 18;
  return registers.configured || (_xgetbv(1) >> kTileData & 1);
}

// Whether vdpbf16ps runs: virtual machines may hide what their CPU has.
extern "C" int runs_avx512_bf16() {
  struct sigaction action = {}, previous;
  action.sa_handler = stop_probing;
  sigaction(SIGILL, &action, &previous);
  const int stopped = sigsetjmp(probing, 1);
  if (!stopped) __asm__ volatile("vdpbf16ps %%zmm0, %%zmm0, %%zmm0" ::: "xmm0");
  sigaction(SIGILL, &previous, nullptr);
  return !stopped;
}
