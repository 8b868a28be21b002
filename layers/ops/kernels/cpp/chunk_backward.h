// The backward pass of a chunk; see chunk.h.
#pragma once

#include <algorithm>

#include "chunk.h"

namespace memzoo {

template <typename T>
void Chunk<T>::backward(
    const Fields<const T>& in, const States<const T>& from, const T* d_y, const Matrices<const T>& d_at,
    const Fields<T>& grads, const States<T>& grad) {
  keys(in, from);
  errors(true);
  reads(in, from, nullptr);
  d_x_[0] = grads.k;
  d_d_.back() = memory_.has_norm ? d_last_ : grads.v;
  for (int64_t i = 0; i < memory_.depth(); ++i) {
    std::fill_n(d_x_[i], memory_.tokens * memory_.widths[i], T(0));
    std::fill_n(d_d_[i], memory_.tokens * memory_.widths[i + 1], T(0));
  }
  d_writes(in, grads, grad.carry);
  d_transition(in, from.carry, grads, grad.carry);
  d_reads(in, from, d_y, grads, grad);
  if (memory_.limit) d_limit();
  // Of the weights that gradients are taken at: those given, or the first block, or its sum with the anchor.
  const bool is_sum = from.base.empty() && !from.anchor.empty();
  const Matrices<T>& d_weights = is_sum ? d_weights_ : from.base.empty() ? grad.carry : grad.base;
  for (int64_t i = 0; i < memory_.depth() && is_sum; ++i) std::fill_n(d_weights[i], memory_.numbers(i), T(0));
  d_errors(d_weights);
  if (memory_.has_norm) d_norm(grads, from, grad);
  d_keys(d_weights);
  for (int64_t i = 0; i < memory_.depth(); ++i) {
    const int64_t size = memory_.numbers(i);
    if (!d_at.empty()) add(size, d_at[i], d_weights[i]);
    if (!is_sum) continue;
    add(size, d_weights[i], grad.carry[i]);
    add(size, d_weights[i], grad.anchor[i]);
  }
}

// From the new blocks' gradients to write, x and d.
template <typename T>
void Chunk<T>::d_writes(const Fields<const T>& in, const Fields<T>& grads, const Matrices<T>& grad) {
  const auto& m = memory_;
  for (int64_t b = 0; b < m.blocks; ++b) {
    const T* scale = in.write_of(b);
    T* dots = dots_;
    std::fill_n(dots, m.tokens * Vector<T>::size(), T(0));
    for (int64_t i = 0; i < m.depth(); ++i) {
      const int64_t from = m.widths[i], to = m.widths[i + 1];
      const T* g = grad[b * m.depth() + i];
      transpose(from, to, g, flipped_);
      if (m.widens(i)) {
        product<T, Into::kPull>(m.tokens, to, from, d_[i], flipped_, d_x_[i], {scale, x_[i], dots});
        product<T, Into::kAddScaled>(m.tokens, from, to, x_[i], g, d_d_[i], {scale});
      } else {
        product<T, Into::kPull>(m.tokens, from, to, x_[i], g, d_d_[i], {scale, d_[i], dots});
        product<T, Into::kAddScaled>(m.tokens, to, from, d_[i], flipped_, d_x_[i], {scale});
      }
    }
    sum_vectors(m.tokens, dots, grads.write_of(b));
  }
}

// From the new blocks' gradients to the old ones' and to transition.
template <typename T>
void Chunk<T>::d_transition(
    const Fields<const T>& in, const Matrices<const T>& old, const Fields<T>& grads, const Matrices<T>& grad) {
  const auto& m = memory_;
  const int64_t depth = m.depth(), stride = in.transition_stride;
  const Vector<T> kept(in.transition[0]);
  Vector<T> of_kept(T(0)), of_share(T(0)), of_later(T(0));
  for (int64_t i = 0; i < depth && m.blocks == 1; ++i) {
    each_vector<T>(m.numbers(i), [&](int64_t at) {
      const Vector<T> g = Vector<T>::loadu(grad[i] + at);
      of_kept = at::vec::fmadd(g, Vector<T>::loadu(old[i] + at), of_kept);
      (g * kept).store(grad[i] + at);
    });
  }
  grads.transition[0] = sum_of(of_kept);
  if (m.blocks == 1) return;
  const Vector<T> share(in.transition[stride]), later_kept(in.transition[3 * stride]);
  for (int64_t i = 0; i < depth; ++i) {
    T *own_grad = grad[i], *later_grad = grad[depth + i];
    each_vector<T>(m.numbers(i), [&](int64_t at) {
      const Vector<T> g = Vector<T>::loadu(own_grad + at), h = Vector<T>::loadu(later_grad + at);
      const Vector<T> s = Vector<T>::loadu(old[depth + i] + at);
      of_kept = at::vec::fmadd(g, Vector<T>::loadu(old[i] + at), of_kept);
      of_share = at::vec::fmadd(g, s, of_share);
      of_later = at::vec::fmadd(h, s, of_later);
      (g * kept).store(own_grad + at);
      at::vec::fmadd(h, later_kept, g * share).store(later_grad + at);
    });
  }
  grads.transition[0] = sum_of(of_kept);
  grads.transition[stride] = sum_of(of_share);
  grads.transition[2 * stride] = 0;  // from a block to a later one nothing flows
  grads.transition[3 * stride] = sum_of(of_later);
}

// From the reads, last layer first: out = diag(read) a old + mixed d + a anchor.
template <typename T>
void Chunk<T>::d_reads(
    const Fields<const T>& in, const States<const T>& from, const T* d_y, const Fields<T>& grads,
    const States<T>& grad) {
  const auto& m = memory_;
  const int64_t last = m.depth() - 1, tokens = m.tokens;
  const int64_t vectors = tokens * Vector<T>::size();
  std::fill_n(dots_, m.blocks * vectors, T(0));
  const T* d_out = d_y;
  for (int64_t i = last; i >= 0; --i) {
    const int64_t width = m.widths[i], to = m.widths[i + 1];
    product<T, Into::kAdd, true, Causal::kLeft>(tokens, tokens, to, mixed_[i], d_out, d_d_[i]);
    transpose(tokens, to, d_[i], flipped_);
    product<T, Into::kSet, false, Causal::kResult>(tokens, to, tokens, d_out, flipped_, d_score_);
    for (int64_t t = 0; t < tokens; ++t) d_mixing(t, in.mix, score_[i], grads.mix, i == last);
    T* d_a = i ? d_a_ : grads.q;
    product<T, Into::kSet, false, Causal::kLeft>(tokens, tokens, width, d_score_, x_[i], d_a);
    product<T, Into::kAdd, true, Causal::kLeft>(tokens, tokens, width, d_score_, a_[i], d_x_[i]);
    for (int64_t b = 0; b < m.blocks; ++b) {
      const T* flipped = flipped_;
      const T* block = from.carry[b * m.depth() + i];
      if (block == w_[i]) {
        flipped = flipped_weights_[i];
      } else {
        transpose(width, to, block, flipped_);
      }
      product<T, Into::kPull>(
          tokens, to, width, d_out, flipped, d_a, {in.read_of(b), a_[i], dots_ + b * vectors});
      add_outer(i, a_[i], d_out, in.read_of(b), grad.carry[b * m.depth() + i]);
    }
    if (!from.anchor.empty()) {
      transpose(width, to, from.anchor[i], flipped_);
      product<T, Into::kAdd>(tokens, to, width, d_out, flipped_, d_a);
      product<T, Into::kAdd, true>(width, tokens, to, a_[i], d_out, grad.anchor[i]);
    }
    if (i == 0) break;
    pull(tokens * width, d_a, out_slope_[i - 1], d_out_);
    d_out = d_out_;
  }
  for (int64_t b = 0; b < m.blocks; ++b) sum_vectors(tokens, dots_ + b * vectors, grads.read_of(b));
}

// Row t of a layer's mixing: from the gradient of mixed to those of the table and, in its place, of the scores.
template <typename T>
void Chunk<T>::d_mixing(int64_t t, const T* mix, const T* score, T* d_mix, bool is_first) {
  const int64_t tokens = memory_.tokens, width = causal_width<T>(t);
  T *d = d_score_ + t * tokens, *into = d_mix + t * tokens;
  if (is_first) std::fill_n(into, tokens, T(0));
  each_vector<T>(width, [&](int64_t i) {
    const Vector<T> g = Vector<T>::loadu(d + i);
    const Vector<T> sum = Vector<T>::loadu(into + i);
    at::vec::fmadd(g, Vector<T>::loadu(score + t * tokens + i), sum).store(into + i);
    (g * Vector<T>::loadu(mix + t * tokens + i)).store(d + i);
  });
}

// From the limited errors to the raw ones, which d then holds; see ``clip_backward``.
template <typename T>
void Chunk<T>::d_limit() {
  const auto& m = memory_;
  for (int64_t t = 0; t < m.tokens; ++t) {
    const T factor = factor_[t];
    if (factor == 1) continue;
    T d_factor = 0;
    for (int64_t i = 0; i < m.depth(); ++i) {
      const int64_t width = m.widths[i + 1];
      T *d = d_[i] + t * width, *d_d = d_d_[i] + t * width;
      if (factor == 0) {
        std::fill_n(d_d, width, T(0));
        continue;
      }
      for (int64_t n = 0; n < width; ++n) {
        d[n] /= factor;
        d_factor += d_d[n] * d[n];
        d_d[n] *= factor;
      }
    }
    if (factor == 0) continue;
    const T d_squared = -d_factor * factor / squared_norm(t);  // twice that of the squared norm
    for (int64_t i = 0; i < m.depth(); ++i) {
      const int64_t from = m.widths[i], to = m.widths[i + 1];
      for (int64_t n = t * to; n < (t + 1) * to; ++n) d_d_[i][n] += d_[i][n] * d_squared * norm_x_[i][t];
      for (int64_t n = t * from; n < (t + 1) * from; ++n) d_x_[i][n] += x_[i][n] * d_squared * norm_d_[i][t];
    }
  }
}

// The errors, first layer first: e = d_next w_next^T, d = e * act'.
template <typename T>
void Chunk<T>::d_errors(const Matrices<T>& d_weights) {
  const auto& m = memory_;
  const int64_t last = m.depth() - 1;
  for (int64_t i = 0; i < last; ++i) {
    const int64_t size = m.tokens * m.widths[i + 1];
    multiply(size, d_d_[i], e_[i], d_z_[i]);
    pull(size, d_z_[i], bend_[i], d_z_[i]);
    pull(size, d_d_[i], slope_[i], product_);
    const int64_t from = m.widths[i + 1], to = m.widths[i + 2];
    product<T, Into::kAdd>(m.tokens, from, to, product_, w_[i + 1], d_d_[i + 1]);
    product<T, Into::kAdd, true>(from, m.tokens, to, product_, d_[i + 1], d_weights[i + 1]);
  }
  if (m.loss_scale == 1) return;
  const Vector<T> scale(m.loss_scale);
  each_vector<T>(m.tokens * m.widths[last + 1], [&](int64_t n) {
    (Vector<T>::loadu(d_d_[last] + n) * scale).store(d_d_[last] + n);
  });
}

// The error behind the norm, from its gradient to minus that of the network's output: both are the last d's.
template <typename T>
void Chunk<T>::d_norm(const Fields<T>& grads, const States<const T>& from, const States<T>& grad) {
  const int64_t width = memory_.widths.back();
  for (int64_t t = 0; t < memory_.tokens; ++t) {
    const int64_t at = t * width;
    T* d_error = grads.v + at;
    gradient_backward<T>(
        width, {normal_ + at, missed_ + at, from.norm[0], deviation_[t], grad.norm[0], grad.norm[1]}, d_last_ + at,
        d_error, rows_);
    each_vector<T>(width, [&](int64_t i) {
      const Vector<T> d = Vector<T>::loadu(d_error + i);
      (Vector<T>::loadu(grads.k + at + i) + d).store(grads.k + at + i);
      d.neg().store(d_error + i);
    });
  }
}

// The keys, last layer first: z = x w, x_next = act(z); the gradient of the last z is minus that of the last error.
template <typename T>
void Chunk<T>::d_keys(const Matrices<T>& d_weights) {
  const auto& m = memory_;
  for (int64_t i = m.depth() - 1; i >= 0; --i) {
    const int64_t from = m.widths[i], to = m.widths[i + 1];
    T* to_weights = d_weights[i];
    if (i == m.depth() - 1) {
      product<T, Into::kSubtract>(m.tokens, to, from, d_d_[i], flipped_weights_[i], d_x_[i]);
      product<T, Into::kSubtract, true>(from, m.tokens, to, x_[i], d_d_[i], to_weights);
    } else {
      product<T, Into::kAdd>(m.tokens, to, from, d_z_[i], flipped_weights_[i], d_x_[i]);
      product<T, Into::kAdd, true>(from, m.tokens, to, x_[i], d_z_[i], to_weights);
    }
    if (i == 0) return;
    pull(m.tokens * from, d_x_[i], slope_[i - 1], product_);
    add(m.tokens * from, product_, d_z_[i - 1]);
  }
}

}  // namespace memzoo
