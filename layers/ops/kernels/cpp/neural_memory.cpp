// A neural memory's scan on a CPU: every row, a head of a sequence, goes through its chunks on one core, in its cache.
//
// The operators fill what they are given, as the Triton kernels do; ``memzoo.layers.ops.neural_memory_fused`` says
// what each tensor holds.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "chunk_backward.h"
#include "tables.h"

namespace memzoo {
namespace {

using at::Tensor;

template <typename T>
Memory<T> memory_of(
    const std::vector<Tensor>& inputs, const std::vector<Tensor>& anchor, const std::vector<Tensor>& norm,
    const std::vector<int64_t>& widths, const std::string& activation, double loss_scale,
    std::optional<double> limit) {
  TORCH_CHECK(inputs[3].size(2) % 16 == 0, "chunks of ", inputs[3].size(2), " tokens; 16 must divide them");
  for (int64_t width : widths) TORCH_CHECK(width % 16 == 0, "a width of ", width, "; 16 must divide it");
  std::optional<T> own_limit;
  if (limit) own_limit = static_cast<T>(*limit);
  return {inputs[3].size(2), inputs.back().size(1), widths, jet_of<T>(activation),
          static_cast<T>(loss_scale), own_limit, !anchor.empty(), !norm.empty()};
}

// The coefficients of row ``row`` in chunk ``j``, of tensors mix (n, R, C, C), read and write (n, k, R, C, 1) and
// transition (n, k, k, R, 1, 1), of which the first is ``tensors[begin]``.
template <typename P>
Fields<P> coefficients_of(const std::vector<Tensor>& tensors, size_t begin, int64_t j, int64_t row) {
  using T = std::remove_const_t<P>;
  const Tensor &mix = tensors[begin], &read = tensors[begin + 1], &write = tensors[begin + 2];
  const Tensor& transition = tensors[begin + 3];
  const int64_t rows = mix.size(1), tokens = mix.size(2), blocks = transition.size(1);
  const int64_t place = (j * blocks * rows + row) * tokens;
  return {
      nullptr, nullptr, nullptr, mix.data_ptr<T>() + (j * rows + row) * tokens * tokens, read.data_ptr<T>() + place,
      write.data_ptr<T>() + place, transition.data_ptr<T>() + j * blocks * blocks * rows + row, rows * tokens, rows};
}

// Queries, keys, values or reads (batch, n C, heads, d), wherever a token lies, of which rows are (batch, heads).
template <typename T>
class Rows {
 public:
  Rows(const Tensor& tensor, int64_t tokens)
      : data_(tensor.data_ptr<T>()),
        batch_stride_(tensor.stride(0)),
        time_stride_(tensor.stride(1)),
        head_stride_(tensor.stride(2)),
        heads_(tensor.size(2)),
        width_(tensor.size(3)),
        tokens_(tokens),
        room_(tokens * width_) {}

  T* room() { return room_.data(); }

  // Bring the tokens of row ``row`` in chunk ``j`` together, or back to their places.
  const T* gather(int64_t j, int64_t row) {
    for (int64_t t = 0; t < tokens_; ++t) std::copy_n(place(j, row, t), width_, room() + t * width_);
    return room();
  }
  void scatter(int64_t j, int64_t row) {
    for (int64_t t = 0; t < tokens_; ++t) std::copy_n(room() + t * width_, width_, place(j, row, t));
  }

 private:
  T* place(int64_t j, int64_t row, int64_t t) const {
    return data_ + row / heads_ * batch_stride_ + row % heads_ * head_stride_ + (j * tokens_ + t) * time_stride_;
  }

  T* data_;
  int64_t batch_stride_, time_stride_, head_stride_, heads_, width_, tokens_;
  Room<T> room_;
};

// The gates (n, R, C) in that order at row and chunk ``place``; the last may be missing.
template <typename P>
Gates<P> gates_of(const std::vector<Tensor>& tensors, int64_t place) {
  using T = std::remove_const_t<P>;
  const int64_t offset = place * tensors[0].size(2);
  const auto at = [&](size_t i) { return i < tensors.size() ? tensors[i].data_ptr<T>() + offset : nullptr; };
  return {at(0), at(1), at(2), at(3)};
}

// The matrices of row ``row``, of tensors (R, d_{l-1}, d_l).
template <typename P>
Matrices<P> matrices_of(const std::vector<Tensor>& tensors, int64_t row) {
  Matrices<P> matrices;
  for (const Tensor& t : tensors) matrices.push_back(t.data_ptr<std::remove_const_t<P>>() + row * t.stride(0));
  return matrices;
}

// What row ``row`` starts from, or where the gradients of that go.
template <typename P>
States<P> states_of(
    const std::vector<Tensor>& carry, const std::vector<Tensor>& base, const std::vector<Tensor>& anchor,
    const std::vector<Tensor>& norm, int64_t row) {
  return {
      matrices_of<P>(carry, row), matrices_of<P>(base, row), matrices_of<P>(anchor, row), matrices_of<P>(norm, row)};
}

// The matrices of all blocks at ``data``, where they lie one after the other.
template <typename P, typename T>
Matrices<P> packed_matrices(const Memory<T>& memory, P* data) {
  Matrices<P> matrices;
  for (int64_t n = 0; n < memory.blocks * memory.depth(); ++n) {
    matrices.push_back(data);
    data += memory.numbers(n % memory.depth());
  }
  return matrices;
}

// Fill y, error_norm, ends and last_base. Every ``group``-th of the blocks between chunks goes to ``inner`` (number,
// R, numbers), if that has room for any.
void scan(
    std::vector<Tensor> inputs, std::vector<Tensor> start, std::vector<Tensor> base, std::vector<Tensor> anchor,
    std::vector<Tensor> norm, Tensor last, int64_t group, Tensor inner, Tensor y, Tensor error_norm,
    std::vector<Tensor> ends, std::vector<Tensor> last_base, std::vector<int64_t> widths, std::string activation,
    double loss_scale, std::optional<double> limit) {
  AT_DISPATCH_FLOATING_TYPES(y.scalar_type(), "neural_memory_scan", [&] {
    const auto memory = memory_of<scalar_t>(inputs, anchor, norm, widths, activation, loss_scale, limit);
    const int64_t chunks = inputs[3].size(0), rows = inputs[3].size(1), numbers = inner.size(2);
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      Chunk<scalar_t> chunk(memory, false);
      Rows<scalar_t> q(inputs[0], memory.tokens), k(inputs[1], memory.tokens), v(inputs[2], memory.tokens);
      Rows<scalar_t> reads(y, memory.tokens);
      Room<scalar_t> passing(numbers);
      for (int64_t row = begin; row < end; ++row) {
        auto from = states_of<const scalar_t>(start, base, anchor, norm, row);
        for (int64_t j = 0; j < chunks; ++j) {
          auto next = matrices_of<scalar_t>(ends, row);
          if (j + 1 < chunks) {
            const bool is_kept = inner.size(0) > 0 && (j + 1) % group == 0;
            scalar_t* place = passing.data();
            if (is_kept) place = inner.data_ptr<scalar_t>() + (((j + 1) / group - 1) * rows + row) * numbers;
            next = packed_matrices(memory, place);
          }
          Matrices<scalar_t> at;
          if (j == last.data_ptr<int32_t>()[row]) at = matrices_of<scalar_t>(last_base, row);
          auto fields = coefficients_of<const scalar_t>(inputs, 3, j, row);
          fields.q = q.gather(j, row), fields.k = k.gather(j, row), fields.v = v.gather(j, row);
          scalar_t* norms = error_norm.data_ptr<scalar_t>() + (j * rows + row) * memory.tokens;
          chunk.forward(fields, from, next, reads.room(), norms, at);
          reads.scatter(j, row);
          from.carry.assign(next.begin(), next.end());
          from.base.clear();
        }
      }
    });
  });
}

// Fill grads; d_start holds the gradients of the last blocks and is left with those of the first, d_base, d_anchor and
// d_norm are added to.
void scan_gradients(
    std::vector<Tensor> inputs, std::vector<Tensor> start, std::vector<Tensor> base, std::vector<Tensor> anchor,
    std::vector<Tensor> norm, Tensor last, int64_t group, Tensor inner, Tensor d_y, std::vector<Tensor> d_last_base,
    std::vector<Tensor> grads, std::vector<Tensor> d_start, std::vector<Tensor> d_base, std::vector<Tensor> d_anchor,
    std::vector<Tensor> d_norm, std::vector<int64_t> widths, std::string activation, double loss_scale,
    std::optional<double> limit) {
  AT_DISPATCH_FLOATING_TYPES(d_y.scalar_type(), "neural_memory_scan_gradients", [&] {
    const auto memory = memory_of<scalar_t>(inputs, anchor, norm, widths, activation, loss_scale, limit);
    const int64_t chunks = inputs[3].size(0), rows = inputs[3].size(1), numbers = inner.size(2);
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      Chunk<scalar_t> chunk(memory, true);
      Rows<scalar_t> q(inputs[0], memory.tokens), k(inputs[1], memory.tokens), v(inputs[2], memory.tokens);
      Rows<scalar_t> d_q(grads[0], memory.tokens), d_k(grads[1], memory.tokens), d_v(grads[2], memory.tokens);
      Rows<scalar_t> d_reads(d_y, memory.tokens);
      Room<scalar_t> again(std::min(group - 1, chunks - 1) * numbers);  // blocks in a group, behind its first chunk
      for (int64_t row = begin; row < end; ++row) {
        const auto first = states_of<const scalar_t>(start, base, anchor, norm, row);
        const auto grad = states_of<scalar_t>(d_start, d_base, d_anchor, d_norm, row);
        for (int64_t begins = (chunks - 1) / group * group; begins >= 0; begins -= group) {
          auto from = first;
          if (begins > 0) {
            const scalar_t* place = inner.data_ptr<scalar_t>() + ((begins / group - 1) * rows + row) * numbers;
            from.carry = packed_matrices(memory, place);
            from.base.clear();
          }
          const auto at_begin = from;
          const int64_t past = std::min(begins + group, chunks);
          for (int64_t j = begins; j + 1 < past; ++j) {
            auto fields = coefficients_of<const scalar_t>(inputs, 3, j, row);
            fields.k = k.gather(j, row), fields.v = v.gather(j, row);
            const auto next = packed_matrices(memory, again.data() + (j - begins) * numbers);
            chunk.advance(fields, from, next);
            from.carry.assign(next.begin(), next.end());
            from.base.clear();
          }
          for (int64_t j = past - 1; j >= begins; --j) {
            if (j == begins) {
              from = at_begin;
            } else {
              const scalar_t* place = again.data() + (j - begins - 1) * numbers;
              from.carry = packed_matrices(memory, place);
            }
            Matrices<const scalar_t> d_at;
            if (j == last.data_ptr<int32_t>()[row]) d_at = matrices_of<const scalar_t>(d_last_base, row);
            auto fields = coefficients_of<const scalar_t>(inputs, 3, j, row);
            fields.q = q.gather(j, row), fields.k = k.gather(j, row), fields.v = v.gather(j, row);
            auto to = coefficients_of<scalar_t>(grads, 3, j, row);
            to.q = d_q.room(), to.k = d_k.room(), to.v = d_v.room();
            chunk.backward(fields, from, d_reads.gather(j, row), d_at, to, grad);
            d_q.scatter(j, row), d_k.scatter(j, row), d_v.scatter(j, row);
          }
        }
      }
    });
  });
}

// Call ``table(tables, j, row)`` for every chunk of every row.
template <typename T, typename Table>
void each_table(const std::vector<Tensor>& gates, const Tensor& transition, const Table& table) {
  const int64_t rows = gates[0].size(1);
  at::parallel_for(0, gates[0].size(0) * rows, 8, [&](int64_t begin, int64_t end) {
    Tables<T> tables(gates[0].size(2), transition.size(1));
    for (int64_t place = begin; place < end; ++place) table(tables, place / rows, place % rows);
  });
}

// Fill ``coefficients`` from the gates theta, eta, keep and, where not all tokens exist, apply.
void gate_tables(std::vector<Tensor> gates, int64_t shift, std::vector<Tensor> coefficients) {
  AT_DISPATCH_FLOATING_TYPES(gates[0].scalar_type(), "gate_tables", [&] {
    each_table<scalar_t>(gates, coefficients[3], [&](Tables<scalar_t>& tables, int64_t j, int64_t row) {
      const auto own = gates_of<const scalar_t>(gates, j * gates[0].size(1) + row);
      tables.forward(own, shift, coefficients_of<scalar_t>(coefficients, 0, j, row));
    });
  });
}

// Fill ``grads`` of theta, eta and keep from those of the coefficients.
void gate_tables_gradients(
    std::vector<Tensor> gates, int64_t shift, std::vector<Tensor> d_coefficients, std::vector<Tensor> grads) {
  AT_DISPATCH_FLOATING_TYPES(gates[0].scalar_type(), "gate_tables_gradients", [&] {
    each_table<scalar_t>(gates, d_coefficients[3], [&](Tables<scalar_t>& tables, int64_t j, int64_t row) {
      const int64_t place = j * gates[0].size(1) + row;
      const auto d = coefficients_of<const scalar_t>(d_coefficients, 0, j, row);
      tables.backward(gates_of<const scalar_t>(gates, place), shift, d, gates_of<scalar_t>(grads, place));
    });
  });
}

TORCH_LIBRARY_FRAGMENT(memzoo_cpp, library) {
  library.def("gate_tables", &gate_tables);
  library.def("gate_tables_gradients", &gate_tables_gradients);
  library.def("neural_memory_scan", &scan);
  library.def("neural_memory_scan_gradients", &scan_gradients);
}

}  // namespace
}  // namespace memzoo
