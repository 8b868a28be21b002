// A neural memory's scan on a CPU: every row, a head of a sequence, goes through its chunks on one core, in its cache.
//
// The operators fill what they are given, as the Triton kernels do; ``memzoo.layers.ops.neural_memory_fused`` says
// what each tensor holds.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "chunk.h"

namespace memzoo {
namespace {

using at::Tensor;

template <typename T>
Memory<T> memory_of(
    const std::vector<Tensor>& inputs, const std::vector<int64_t>& widths, const std::string& activation,
    double loss_scale, std::optional<double> limit) {
  std::vector<int64_t> begins{0};
  for (size_t i = 0; i + 1 < widths.size(); ++i) begins.push_back(begins.back() + widths[i] * widths[i + 1]);
  std::optional<T> own_limit;
  if (limit) own_limit = static_cast<T>(*limit);
  return {inputs[0].size(2),     inputs.back().size(1),      widths,   begins,
          jet_of<T>(activation), static_cast<T>(loss_scale), own_limit};
}

// The fields of row ``row`` in chunk ``j``, of tensors with all chunks (n) and rows (R).
template <typename P>
Fields<P> fields_of(const std::vector<Tensor>& tensors, int64_t j, int64_t row) {
  using T = std::remove_const_t<P>;
  const int64_t rows = tensors[0].size(1), tokens = tensors[0].size(2), blocks = tensors[6].size(1);
  const auto at = [&](int64_t i, int64_t offset) { return static_cast<P*>(tensors[i].data_ptr<T>()) + offset; };
  const int64_t place = j * rows + row, coefficients = j * blocks * rows * tokens + row * tokens;
  const int64_t key = place * tokens * tensors[0].size(3), value = place * tokens * tensors[2].size(3);
  return {at(0, key),          at(1, key),          at(2, value), at(3, place * tokens * tokens),
          at(4, coefficients), at(5, coefficients), at(6, j * blocks * blocks * rows + row), rows * tokens, rows};
}

template <typename T>
const T* rows_of(const std::optional<Tensor>& tensor, int64_t row, int64_t size) {
  return tensor ? tensor->data_ptr<T>() + row * size : nullptr;
}

// Fill y, error_norm and base, and states behind the first, which are ``stride`` elements apart; 0 keeps the last alone.
void scan(
    std::vector<Tensor> inputs, std::optional<Tensor> anchor, Tensor last, Tensor states, int64_t stride, Tensor y,
    Tensor error_norm, Tensor base, std::vector<int64_t> widths, std::string activation, double loss_scale,
    std::optional<double> limit) {
  AT_DISPATCH_FLOATING_TYPES(states.scalar_type(), "neural_memory_scan", [&] {
    const auto memory = memory_of<scalar_t>(inputs, widths, activation, loss_scale, limit);
    const int64_t chunks = inputs[0].size(0), rows = inputs[0].size(1), size = memory.size();
    const int64_t answers = memory.tokens * widths.back();
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      Chunk<scalar_t> chunk(memory, anchor.has_value(), false);
      for (int64_t row = begin; row < end; ++row) {
        const scalar_t* fixed = rows_of<scalar_t>(anchor, row, size);
        scalar_t* old = states.data_ptr<scalar_t>() + row * memory.blocks * size;
        for (int64_t j = 0; j < chunks; ++j, old += stride) {
          if (j == last.data_ptr<int32_t>()[row]) std::copy_n(old, size, base.data_ptr<scalar_t>() + row * size);
          const int64_t place = j * rows + row;
          chunk.forward(
              fields_of<const scalar_t>(inputs, j, row), old, fixed, old + stride,
              y.data_ptr<scalar_t>() + place * answers, error_norm.data_ptr<scalar_t>() + place * memory.tokens);
        }
      }
    });
  });
}

// Fill grads; d_states holds the gradients of the last blocks and is left with those of the first, d_anchor is added to.
void scan_gradients(
    std::vector<Tensor> inputs, std::optional<Tensor> anchor, Tensor last, Tensor states, Tensor d_y, Tensor d_base,
    std::vector<Tensor> grads, Tensor d_states, Tensor d_anchor, std::vector<int64_t> widths, std::string activation,
    double loss_scale, std::optional<double> limit) {
  AT_DISPATCH_FLOATING_TYPES(states.scalar_type(), "neural_memory_scan_gradients", [&] {
    const auto memory = memory_of<scalar_t>(inputs, widths, activation, loss_scale, limit);
    const int64_t chunks = inputs[0].size(0), rows = inputs[0].size(1), size = memory.size();
    const int64_t answers = memory.tokens * widths.back();
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      Chunk<scalar_t> chunk(memory, anchor.has_value(), true);
      for (int64_t row = begin; row < end; ++row) {
        scalar_t* grad = d_states.data_ptr<scalar_t>() + row * memory.blocks * size;
        scalar_t* of_anchor = d_anchor.data_ptr<scalar_t>() + row * size;
        for (int64_t j = chunks - 1; j >= 0; --j) {
          const int64_t place = j * rows + row;
          const bool is_last = j == last.data_ptr<int32_t>()[row];
          chunk.backward(
              fields_of<const scalar_t>(inputs, j, row), states.data_ptr<scalar_t>() + place * memory.blocks * size,
              rows_of<scalar_t>(anchor, row, size), d_y.data_ptr<scalar_t>() + place * answers,
              is_last ? d_base.data_ptr<scalar_t>() + row * size : nullptr, fields_of<scalar_t>(grads, j, row), grad,
              of_anchor);
        }
      }
    });
  });
}

TORCH_LIBRARY_FRAGMENT(memzoo_cpp, library) {
  library.def("neural_memory_scan", &scan);
  library.def("neural_memory_scan_gradients", &scan_gradients);
}

}  // namespace
}  // namespace memzoo
