// One chunk of a neural memory, forward and backward, of one row: a head of a sequence.
//
// What ``memzoo.layers.ops.neural_memory_chunk`` says for all rows at once, in its notation, with nothing kept for the
// backward pass but the carried blocks at the chunk's start: products of what is in a core's cache are cheaper than
// fetching their results from memory.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "activations.h"
#include "fields.h"
#include "norm.h"
#include "products.h"

namespace memzoo {

// What the chunks of all rows have in common.
template <typename T>
struct Memory {
  int64_t tokens;                // C, of a chunk
  int64_t blocks;                // k
  std::vector<int64_t> widths;   // d_0 .. d_L
  Jet<T> jet;
  T loss_scale;
  std::optional<T> limit;        // of the norm of a token's gradient
  bool has_anchor, has_norm;

  int64_t depth() const { return static_cast<int64_t>(widths.size()) - 1; }
  int64_t numbers(int64_t layer) const { return widths[layer] * widths[layer + 1]; }
  bool widens(int64_t layer) const { return widths[layer] <= widths[layer + 1]; }
};

// Matrices of a row, a layer each, of one block after the other; empty where there are none.
template <typename P>
using Matrices = std::vector<P*>;

// What a chunk starts from, or the gradients of that: the carried blocks, the anchor that the first is counted from,
// the weights at which gradients are taken, where these are not the first block's, and gain and bias of a LayerNorm.
template <typename P>
struct States {
  Matrices<P> carry, base, anchor, norm;
};

template <typename T>
class Chunk {
 public:
  Chunk(const Memory<T>& memory, bool has_backward) : memory_(memory) {
    const int64_t depth = memory.depth(), tokens = memory.tokens;
    const int64_t widest = *std::max_element(memory.widths.begin(), memory.widths.end());
    for (int64_t i = 0; i < depth; ++i) {
      const int64_t in = tokens * memory.widths[i], out = tokens * memory.widths[i + 1];
      x_.push_back(i ? room(in) : nullptr);
      a_.push_back(i ? room(in) : nullptr);
      w_.push_back(nullptr);
      d_.push_back(room(out));
      score_.push_back(room(tokens * tokens));
      mixed_.push_back(room(tokens * tokens));
      weights_.push_back(memory.has_anchor ? room(memory.numbers(i)) : nullptr);
      norm_x_.push_back(room(tokens));
      norm_d_.push_back(room(tokens));
      if (i + 1 < depth) {
        z_.push_back(room(out));
        e_.push_back(room(out));
        out_.push_back(room(out));
        slope_.push_back(room(out));
      }
      if (!has_backward) continue;
      flipped_weights_.push_back(room(memory.numbers(i)));
      d_x_.push_back(i ? room(in) : nullptr);
      d_d_.push_back(i + 1 < depth ? room(out) : nullptr);
      if (i + 1 < depth) {
        bend_.push_back(room(out));
        out_slope_.push_back(room(out));
        d_z_.push_back(room(out));
      }
    }
    factor_ = room(tokens);
    flipped_ = room(std::max(tokens, widest) * widest);
    scaled_ = room(tokens * widest);
    if (memory.has_norm) {
      normal_ = room(tokens * memory.widths.back());
      missed_ = room(tokens * memory.widths.back());
      deviation_ = room(tokens);
      rows_ = room(3 * memory.widths.back());
      d_last_ = has_backward ? room(tokens * memory.widths.back()) : nullptr;
    }
    if (!has_backward) return;
    d_score_ = room(tokens * tokens);
    dots_ = room(memory.blocks * tokens * Vector<T>::size());
    product_ = room(tokens * widest);
    d_a_ = room(tokens * widest);
    d_out_ = room(tokens * widest);
    for (int64_t i = 0; memory.has_anchor && i < depth; ++i) d_weights_.push_back(room(memory.numbers(i)));
  }

  // Read into y, write the norms of the errors, and leave the new blocks in ``next``, which may be the old ones;
  // ``at`` takes the weights at which gradients were taken, if it is not empty.
  void forward(
      const Fields<const T>& in, const States<const T>& from, const Matrices<T>& next, T* y, T* error_norm,
      const Matrices<T>& at) {
    keys(in, from);
    for (int64_t i = 0; i < static_cast<int64_t>(at.size()); ++i) std::copy_n(w_[i], memory_.numbers(i), at[i]);
    for (int64_t t = 0; t < memory_.tokens; ++t) error_norm[t] = norm_d_.back()[t];
    errors(false);
    reads(in, from, y);
    writes(in, from.carry, next);
  }

  // ``forward`` without its reads, which needs neither queries nor the coefficients of reads.
  void advance(const Fields<const T>& in, const States<const T>& from, const Matrices<T>& next) {
    keys(in, from);
    errors(false);
    writes(in, from.carry, next);
  }

  // Compute the chunk again and its gradients. ``grad.carry`` holds those of the new blocks and is left with those of
  // the old; what else ``grad`` has is added to. d_at are those of the ``at`` that forward filled, or empty.
  void backward(
      const Fields<const T>& in, const States<const T>& from, const T* d_y, const Matrices<const T>& d_at,
      const Fields<T>& grads, const States<T>& grad);

 private:
  T* room(int64_t size) {
    rooms_.emplace_back(size);
    return rooms_.back().data();
  }

  static void add(int64_t size, const T* from, T* to) {
    each_vector<T>(size, [&](int64_t i) { (Vector<T>::loadu(from + i) + Vector<T>::loadu(to + i)).store(to + i); });
  }

  // Keys through the weights at which gradients are taken: z, x, slope, bend, the last error and its norm.
  void keys(const Fields<const T>& in, const States<const T>& from) {
    const auto& m = memory_;
    const int64_t last = m.depth() - 1;
    x_[0] = in.k;
    for (int64_t i = 0; i <= last; ++i) {
      w_[i] = from.base.empty() ? from.carry[i] : from.base[i];
      if (from.base.empty() && !from.anchor.empty()) {
        std::copy_n(from.carry[i], m.numbers(i), weights_[i]);
        add(m.numbers(i), from.anchor[i], weights_[i]);
        w_[i] = weights_[i];
      }
      if (i == last) break;
      product<T, Into::kSet>(m.tokens, m.widths[i], m.widths[i + 1], x_[i], w_[i], z_[i]);
      T* bend = bend_.empty() ? nullptr : bend_[i];
      m.jet(m.tokens * m.widths[i + 1], z_[i], const_cast<T*>(x_[i + 1]), slope_[i], bend);
    }
    if (m.has_norm) {
      product<T, Into::kSet>(m.tokens, m.widths[last], m.widths[last + 1], x_[last], w_[last], d_[last]);
    } else {
      std::copy_n(in.v, m.tokens * m.widths[last + 1], d_[last]);
      product<T, Into::kSubtract>(m.tokens, m.widths[last], m.widths[last + 1], x_[last], w_[last], d_[last]);
    }
    for (int64_t t = 0; t < m.tokens; ++t) {
      const T* error = m.has_norm ? error_behind_norm(in, from, t) : d_[last] + t * m.widths[last + 1];
      norm_d_[last][t] = std::sqrt(dot(m.widths[last + 1], error, error));
    }
  }

  // Turn what the network makes of token t's key, in the last d, into the error there, and return that of the memory.
  const T* error_behind_norm(const Fields<const T>& in, const States<const T>& from, int64_t t) {
    const int64_t width = memory_.widths.back(), at = t * width;
    T *d = d_.back() + at, *normal = normal_ + at, *error = missed_ + at;
    const T *gain = from.norm[0], *bias = from.norm[1];
    deviation_[t] = normalise(width, d, normal);
    each_vector<T>(width, [&](int64_t i) {
      const Vector<T> shift = Vector<T>::loadu(bias + i) + Vector<T>::loadu(in.k + at + i);
      const Vector<T> said = at::vec::fmadd(Vector<T>::loadu(gain + i), Vector<T>::loadu(normal + i), shift);
      (said - Vector<T>::loadu(in.v + at + i)).store(error + i);
    });
    negative_gradient<T>(width, {normal, error, gain, deviation_[t], nullptr, nullptr}, d, rows_);
    return error;
  }

  // Errors backward, e and d, and the limit on their norm. Keeps the weights transposed, if a backward pass follows.
  void errors(bool keeps_all) {
    const auto& m = memory_;
    const int64_t last = m.depth() - 1;
    if (m.loss_scale != 1) {
      const Vector<T> scale(m.loss_scale);
      each_vector<T>(m.tokens * m.widths[last + 1], [&](int64_t i) {
        (Vector<T>::loadu(d_[last] + i) * scale).store(d_[last] + i);
      });
    }
    for (int64_t i = last; i >= 0; --i) {
      T* flipped = keeps_all ? flipped_weights_[i] : flipped_;
      if (i || keeps_all) transpose(m.widths[i], m.widths[i + 1], w_[i], flipped);
      if (!i) break;
      product<T, Into::kSet>(m.tokens, m.widths[i + 1], m.widths[i], d_[i], flipped, e_[i - 1]);
      pull(m.tokens * m.widths[i], e_[i - 1], slope_[i - 1], d_[i - 1]);
    }
    if (!m.limit) return;
    const T most = *m.limit * *m.limit;
    for (int64_t i = 0; i <= last; ++i) {
      squared_norms(m.widths[i], x_[i], norm_x_[i]);
      squared_norms(m.widths[i + 1], d_[i], norm_d_[i]);
    }
    for (int64_t t = 0; t < m.tokens; ++t) {
      const T squared = squared_norm(t);
      const bool finite = std::isfinite(squared);
      factor_[t] = !finite ? T(0) : squared > most ? *m.limit / std::sqrt(squared) : T(1);
      if (factor_[t] == 1) continue;
      for (int64_t i = 0; i <= last; ++i) {  // what is not finite may not be multiplied by zero
        const int64_t width = m.widths[i + 1];
        for (int64_t n = t * width; n < (t + 1) * width; ++n) d_[i][n] = finite ? d_[i][n] * factor_[t] : T(0);
        if (finite) continue;  // of a token that is dropped nothing may be left: any of it can be infinite
        std::fill_n(const_cast<T*>(x_[i]) + t * m.widths[i], m.widths[i], T(0));  // keys are gathered, a copy
        if (i == last) continue;
        for (T* part : {e_[i], z_[i], slope_[i], bend_.empty() ? nullptr : bend_[i]}) {
          if (part != nullptr) std::fill_n(part + t * width, width, T(0));
        }
      }
      if (finite || !m.has_norm) continue;
      const int64_t width = m.widths.back();
      std::fill_n(normal_ + t * width, width, T(0));
      std::fill_n(missed_ + t * width, width, T(0));
      deviation_[t] = 1;
    }
  }

  // Queries through the weights after each token, the last layer into y; without y not so far, as a backward pass
  // needs it.
  void reads(const Fields<const T>& in, const States<const T>& from, T* y) {
    const auto& m = memory_;
    const int64_t last = m.depth() - 1;
    a_[0] = in.q;
    for (int64_t i = 0; i <= last; ++i) {
      const int64_t width = m.widths[i], to = m.widths[i + 1];
      transpose(m.tokens, width, x_[i], flipped_);
      product<T, Into::kSet, false, Causal::kResult>(m.tokens, width, m.tokens, a_[i], flipped_, score_[i]);
      for (int64_t t = 0; t < m.tokens; ++t) {
        multiply(causal_width<T>(t), score_[i] + t * m.tokens, in.mix + t * m.tokens, mixed_[i] + t * m.tokens);
      }
      if (i == last && y == nullptr) return;
      T* out = i == last ? y : out_[i];
      product<T, Into::kSet, false, Causal::kLeft>(m.tokens, m.tokens, to, mixed_[i], d_[i], out);
      for (int64_t b = 0; b < m.blocks; ++b) {
        product<T, Into::kAddScaled>(m.tokens, width, to, a_[i], from.carry[b * m.depth() + i], out, {in.read_of(b)});
      }
      if (!from.anchor.empty()) product<T, Into::kAdd>(m.tokens, width, to, a_[i], from.anchor[i], out);
      if (i == last) return;
      T* slope = out_slope_.empty() ? nullptr : out_slope_[i];
      m.jet(m.tokens * to, out, const_cast<T*>(a_[i + 1]), slope, nullptr);
    }
  }

  // The new blocks: transition old + x^T diag(write) d.
  void writes(const Fields<const T>& in, const Matrices<const T>& old, const Matrices<T>& next) {
    const auto& m = memory_;
    // The old ones are read no later than they may be written over.
    for (int64_t n = 0; n < m.blocks * m.depth(); ++n) {
      const int64_t b = n / m.depth(), i = n % m.depth();
      const T* shares = in.transition + b * m.blocks * in.transition_stride;
      const Vector<T> kept(shares[b * in.transition_stride]);
      if (b + 1 == m.blocks) {
        each_vector<T>(m.numbers(i), [&](int64_t at) { (Vector<T>::loadu(old[n] + at) * kept).store(next[n] + at); });
      } else {
        const T* later = old[n + m.depth()];
        const Vector<T> share(shares[(b + 1) * in.transition_stride]);
        each_vector<T>(m.numbers(i), [&](int64_t at) {
          const Vector<T> part = Vector<T>::loadu(later + at) * share;
          at::vec::fmadd(Vector<T>::loadu(old[n] + at), kept, part).store(next[n] + at);
        });
      }
      add_outer(i, x_[i], d_[i], in.write_of(b), next[n]);
    }
  }

  // to += x^T diag(scale) d: outer products of a layer's inputs and of what is at its outputs.
  void add_outer(int64_t i, const T* x, const T* d, const T* scale, T* to) {
    const auto& m = memory_;
    const int64_t from = m.widths[i], width = m.widths[i + 1];
    if (m.widens(i)) {
      scale_rows(m.tokens, from, x, scale, scaled_);
      x = scaled_;
    } else {
      scale_rows(m.tokens, width, d, scale, scaled_);
      d = scaled_;
    }
    product<T, Into::kAdd, true>(from, m.tokens, width, x, d, to);
  }

  // The steps of ``backward``, in chunk_backward.h.
  void d_writes(const Fields<const T>& in, const Fields<T>& grads, const Matrices<T>& grad);
  void d_transition(
      const Fields<const T>& in, const Matrices<const T>& old, const Fields<T>& grads, const Matrices<T>& grad);
  void d_reads(
      const Fields<const T>& in, const States<const T>& from, const T* d_y, const Fields<T>& grads,
      const States<T>& grad);
  void d_mixing(int64_t t, const T* mix, const T* score, T* d_mix, bool is_first);
  void d_limit();
  void d_errors(const Matrices<T>& d_weights);
  void d_norm(const Fields<T>& grads, const States<const T>& from, const States<T>& grad);
  void d_keys(const Matrices<T>& d_weights);

  static void multiply(int64_t size, const T* x, const T* y, T* to) {
    each_vector<T>(size, [&](int64_t i) { (Vector<T>::loadu(x + i) * Vector<T>::loadu(y + i)).store(to + i); });
  }

  // to = g f', zero where f' is: an infinite error may meet an activation that is off.
  static void pull(int64_t size, const T* g, const T* slope, T* to) {
    const Vector<T> zero(T(0));
    each_vector<T>(size, [&](int64_t i) {
      const Vector<T> s = Vector<T>::loadu(slope + i);
      Vector<T>::blendv(Vector<T>::loadu(g + i) * s, zero, s == zero).store(to + i);
    });
  }

  void squared_norms(int64_t width, const T* rows, T* norms) const {
    for (int64_t t = 0; t < memory_.tokens; ++t) norms[t] = dot(width, rows + t * width, rows + t * width);
  }

  // Of a token's gradient: all layers' squared norms of their inputs times those of their errors.
  T squared_norm(int64_t t) const {
    T sum = 0;
    for (int64_t i = 0; i < memory_.depth(); ++i) sum += norm_x_[i][t] * norm_d_[i][t];
    return sum;
  }

  const Memory<T>& memory_;
  std::vector<Room<T>> rooms_;
  // A layer each. Inputs, errors and outputs are those of ``ChunkWork``; w are the weights that gradients are taken at.
  std::vector<const T*> x_, a_, w_;
  std::vector<T*> z_, e_, d_, out_, slope_, bend_, out_slope_, score_, mixed_, weights_, flipped_weights_;
  std::vector<T*> norm_x_, norm_d_, d_x_, d_d_, d_z_, d_weights_;
  // With a norm: what it makes of the network's outputs and the errors behind it, (C, d_L), and the deviations.
  T *normal_ = nullptr, *missed_ = nullptr, *deviation_ = nullptr, *rows_ = nullptr, *d_last_ = nullptr;
  // A token each, or for the work of a moment.
  T *factor_, *flipped_, *scaled_, *d_score_, *dots_, *product_, *d_a_, *d_out_;
};

}  // namespace memzoo
