// A convolution whose kernel is as large as its stride: each patch is a row of a product.
#include <torch/library.h>

#include "shell.h"

namespace adacomcat {
namespace {

struct Patches {
  const at::Tensor& image;  // its rows of pixels are contiguous
  int64_t height, width;    // of a patch
  int64_t across, count;    // in a row of patches, in an image

  // Patch number `patch` of all images as one row: channel by channel, line by line.
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

// image (B, C, H, W), weight (out, C, height, width), bias (out), prefix (n, out), positions
// (patches, out) → (B, n + patches, out).
at::Tensor patch_embedding(const at::Tensor& image, const at::Tensor& weight,
                           const OptionalTensor& bias, const OptionalTensor& prefix,
                           const OptionalTensor& positions) {
  TORCH_CHECK(image.dim() == 4 && weight.dim() == 4, "image (B, C, H, W) and weight "
              "(out, C, height, width) expected, got ", image.sizes(), " and ", weight.sizes());
  const int64_t out = weight.size(0), height = weight.size(2), width = weight.size(3);
  check(image, weight, "weight", {out, image.size(1), height, width});
  if (bias) check(image, *bias, "bias", {out});
  if (prefix) check(image, *prefix, "prefix", {prefix->size(0), out});
  const Engine& e = engine(dtype_of(image));
  TORCH_CHECK(height > 0 && width > 0 && width % e.group == 0, "patches of ", height, " x ", width,
              " pixels: the kernel takes an even width");
  const at::Tensor held = image.stride(3) == 1 ? image : image.contiguous();
  const int64_t across = image.size(3) / width, count = image.size(2) / height * across;
  const int64_t rows = image.size(0) * count, k = image.size(1) * height * width;
  const int64_t leading = prefix ? prefix->size(0) : 0, tokens = leading + count;
  if (positions) check(image, *positions, "positions", {count, out});
  at::Tensor y = at::empty({image.size(0), tokens, out}, image.options());
  if (leading) y.narrow(1, 0, leading).copy_(prefix->expand({image.size(0), leading, out}));
  if (!rows || !out) return y;

  const Patches patches{held, height, width, across, count};
  const Packed packed_weight = packed(e, weight.reshape({out, k}), true);
  const Bias b(bias);
  std::optional<RowsOf> added;
  if (positions) added.emplace(*positions);
  const Dtype dtype = dtype_of(y);
  char* result = static_cast<char*>(y.mutable_data_ptr());
  const int64_t block = block_rows(e, rows), size = e.operand_size();
  const int64_t columns = sum_columns(e, k, out);

  for_each_block(e, rows, [&](int64_t row, int64_t m, Turn turn) {
    Scratch scratch(Scratch::aligned(block * k * size) + Scratch::aligned(block * columns * 4));
    char* left = scratch.take<char>(block * k * size);
    float* sums = scratch.take<float>(block * columns * 4);
    for (int64_t i = 0; i < m; ++i) patches.load(e, row + i, left + i * k * size);
    for (int64_t done = 0, some; done < m; done += some) {  // of one image after the other
      const int64_t token = (row + done) / count * tokens + leading, patch = (row + done) % count;
      some = std::min(m - done, count - patch);
      Finish finish{result + (token + patch) * out * dtype_size(dtype), out, dtype, b.rows};
      if (added) finish.residual = rows_from(added->rows, patch);
      multiply_long(e, {some, out, k, left + done * k * size, k, packed_weight.data.get(),
                        packed_weight.rows, 0, turn.first && !done ? packed_weight.follower() : Ahead{}},
                    finish, sums);
    }
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(adacomcat, CPU, m) { m.impl("patch_embedding_cpu", &patch_embedding); }

}  // namespace adacomcat
