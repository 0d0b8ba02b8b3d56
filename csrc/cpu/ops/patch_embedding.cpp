// A convolution whose kernel is as large as its stride: each patch is a row of a product.
#include <torch/csrc/stable/library.h>

#include "cpu/runtime/parallel.h"
#include "cpu/runtime/scratch.h"
#include "cpu/runtime/split_k.h"
#include "cpu/runtime/packed_weight.h"

namespace adacomcat {
namespace {

// The patches of all images, numbered image after image.
struct Patches {
  Tensor image;           // (B, C, H, W), its rows of pixels dense
  int64_t height, width;  // of a patch
  int64_t across, count;  // patches in a row, and in an image

  Patches(const Tensor& x, int64_t height, int64_t width)
      : image(x.stride(3) == 1 ? x : torch::stable::contiguous(x)), height(height), width(width),
        across(x.size(3) / width), count(x.size(2) / height * across) {}

  int64_t elements() const { return image.size(1) * height * width; }

  // Copies a patch to a row in the operand format: channel by channel, line by line.
  void load(const Engine& e, int64_t patch, void* row) const {
    const int64_t b = patch / count, y = patch % count / across, x = patch % across;
    const Dtype dtype = dtype_of(image);
    const int64_t corner = b * image.stride(0) + y * height * image.stride(2) + x * width;
    const char* pixels = static_cast<const char*>(image.const_data_ptr());
    for (int64_t c = 0; c < image.size(1); ++c) {
      const int64_t first = corner + c * image.stride(1);
      e.load(height, width, {pixels + first * dtype_size(dtype), image.stride(2), dtype},
             static_cast<char*>(row) + c * height * width * e.operand_size(), width);
    }
  }
};

void check(const Tensor& image, const Tensor& weight, const OptionalTensor& bias,
           const OptionalTensor& prefix) {
  REQUIRE(image.dim() == 4 && weight.dim() == 4,
          "image (B, C, H, W) and weight "
          "(out, C, height, width) expected, got ",
          image.sizes(), " and ", weight.sizes());
  const int64_t out = weight.size(0), height = weight.size(2), width = weight.size(3);
  check_like(image, weight, "weight", {out, image.size(1), height, width});
  check_like(image, bias, "bias", {out});
  if (prefix) check_like(image, *prefix, "prefix", {prefix->size(0), out});
  REQUIRE(height > 0 && width > 0 && width % engine(dtype_of(image)).k_group == 0, "patches of ",
          height, " x ", width, " pixels: the kernel takes an even width");
}

// The patches' rows of y (B, tokens, out), `leading` tokens after the start of each image.
void embed(const Engine& e, const Patches& patches, const PackedWeight& weight,
           const OptionalTensor& bias, const OptionalTensor& positions, int64_t leading,
           const Tensor& y) {
  const int64_t rows = y.size(0) * patches.count, k = patches.elements(), out = y.size(2);
  const Bias b(bias);
  std::optional<TensorRows> added;
  if (positions) added.emplace(*positions);
  const OutputRows result(y);
  const int64_t block = block_rows(e, rows), row_bytes = k * e.operand_size();
  const int64_t sum_bytes = block * split_k_columns(e, k, out) * sizeof(float);

  for_each_block(e, rows, [&](int64_t row, int64_t m, Turn turn) {
    Scratch scratch({block * row_bytes, sum_bytes});
    char* lhs = scratch.next<char>();
    float* sums = scratch.next<float>();
    for (int64_t i = 0; i < m; ++i) patches.load(e, row + i, lhs + i * row_bytes);
    // Image after image, since the tokens of two images are not adjacent patches.
    for (int64_t done = 0, some; done < m; done += some) {
      const int64_t image = (row + done) / patches.count, patch = (row + done) % patches.count;
      some = std::min(m - done, patches.count - patch);
      Epilogue epilogue = result.epilogue(image * y.size(1) + leading + patch);
      epilogue.bias = b.rows;
      if (added) epilogue.residual = rows_from(added->rows, patch);
      const bool first = turn.first && !done;
      const PrefetchHint hint = first ? weight.next_weight : PrefetchHint{};
      multiply_split_k(e, weight.product(some, {lhs + done * row_bytes, k}, hint), epilogue, sums);
    }
  });
}

// The tokens of prefix (n, out) as the first ones of every image of y (B, n + patches, out).
void put_before(const Tensor& prefix, int64_t patches, const Tensor& y) {
  const DenseRows tokens(prefix);
  const OutputRows to(y);
  const int64_t leading = prefix.size(0), bytes = y.size(2) * dtype_size(to.dtype);
  for (int64_t row = 0; row < y.size(0) * leading; ++row) {
    const int64_t image = row / leading, token = row % leading;
    std::memcpy(
        to.at(image * (leading + patches) + token),
        static_cast<const char*>(tokens.data()) + token * tokens.stride * dtype_size(to.dtype),
        bytes);
  }
}

// image (B, C, H, W), weight (out, C, height, width), bias (out), prefix (n, out), positions
// (patches, out) → (B, n + patches, out).
Tensor patch_embedding(const Tensor& image, const Tensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& prefix, const OptionalTensor& positions) {
  check(image, weight, bias, prefix);
  const int64_t images = image.size(0), out = weight.size(0);
  const Patches patches(image, weight.size(2), weight.size(3));
  if (positions) check_like(image, *positions, "positions", {patches.count, out});
  const int64_t leading = prefix ? prefix->size(0) : 0;
  const Tensor y = empty_beside(image, {images, leading + patches.count, out});
  if (leading) put_before(*prefix, patches.count, y);
  if (!images || !patches.count || !out) return y;
  const Engine& e = engine(dtype_of(image));
  const PackedWeight packed =
      read_weight(e, torch::stable::reshape(weight, {out, patches.elements()}), true);
  embed(e, patches, packed, bias, positions, leading, y);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adacomcat, CPU, m) {
  m.impl("patch_embedding_cpu", TORCH_BOX(&patch_embedding));
}

}  // namespace adacomcat
