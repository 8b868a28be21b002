// Gate tables of one chunk of one row, and their gradients; see ``memzoo.layers.ops.neural_memory_tables``.
#pragma once

#include <algorithm>
#include <vector>

#include "fields.h"
#include "products.h"

namespace memzoo {

// A number a token each; ``apply`` is null where all tokens exist.
template <typename P>
struct Gates {
  P *theta, *eta, *keep, *apply;
};

// The recurrences n_t = eta_t n_{t-1} + theta_t e_t and G_t = keep_t G_{t-1} + apply_t n_t over rows of C + 2 numbers,
// the C tokens', then what S_0 and W_0 have in them, which n_0 and G_0 are the unit vectors of.
template <typename T>
class Tables {
 public:
  Tables(int64_t tokens, int64_t blocks)
      : tokens_(tokens),
        blocks_(blocks),
        stride_(tokens + 16),
        momentum_((tokens + 1) * stride_),
        weights_((tokens + 1) * stride_),
        d_momentum_(stride_),
        d_weights_(stride_) {}

  // Fill the coefficients; reads are of row t + ``shift``: 1 after a token is written, 0 before.
  void forward(const Gates<const T>& gates, int64_t shift, const Fields<T>& to) {
    run(gates);
    for (int64_t t = 0; t < tokens_; ++t) {
      const T* row = weights(t + shift);
      std::copy_n(row, tokens_, to.mix + t * tokens_);
      to.read_of(0)[t] = row[tokens_ + 1];
      if (blocks_ == 2) to.read_of(1)[t] = row[tokens_];
    }
    const T *row = weights(tokens_), *later = momentum(tokens_);
    std::copy_n(row, tokens_, to.write_of(0));
    to.transition[0] = row[tokens_ + 1];
    if (blocks_ == 1) return;
    std::copy_n(later, tokens_, to.write_of(1));
    to.transition[to.transition_stride] = row[tokens_];
    to.transition[2 * to.transition_stride] = 0;  // from a block to a later one nothing flows
    to.transition[3 * to.transition_stride] = later[tokens_];
  }

  // Fill the gates' gradients but that of ``apply``, which has none.
  void backward(const Gates<const T>& gates, int64_t shift, const Fields<const T>& d, const Gates<T>& grads) {
    run(gates);
    std::fill(d_momentum_.begin(), d_momentum_.end(), T(0));
    std::fill(d_weights_.begin(), d_weights_.end(), T(0));
    for (int64_t t = tokens_; t > 0; --t) {
      if (t == tokens_) {
        add_row(d.write_of(0), d_weights_);
        d_weights_[tokens_ + 1] += d.transition[0];
        if (blocks_ == 2) {
          add_row(d.write_of(1), d_momentum_);
          d_weights_[tokens_] += d.transition[d.transition_stride];
          d_momentum_[tokens_] += d.transition[3 * d.transition_stride];
        }
      }
      if (t - shift < tokens_) {
        add_row(d.mix + (t - shift) * tokens_, d_weights_);
        d_weights_[tokens_ + 1] += d.read_of(0)[t - shift];
        if (blocks_ == 2) d_weights_[tokens_] += d.read_of(1)[t - shift];
      }
      const Vector<T> keep(gates.keep[t - 1]), eta(gates.eta[t - 1]);
      const Vector<T> apply(gates.apply == nullptr ? T(1) : gates.apply[t - 1]);
      const T *weights_before = weights(t - 1), *momentum_before = momentum(t - 1);
      Vector<T> of_keep(T(0)), of_eta(T(0));
      T* own = d_momentum_.data();
      each_vector<T>(stride_, [&](int64_t i) {
        const Vector<T> g = Vector<T>::loadu(&d_weights_[i]);
        of_keep = at::vec::fmadd(g, Vector<T>::loadu(weights_before + i), of_keep);
        (g * keep).store(&d_weights_[i]);
        const Vector<T> h = at::vec::fmadd(g, apply, Vector<T>::loadu(own + i));
        of_eta = at::vec::fmadd(h, Vector<T>::loadu(momentum_before + i), of_eta);
        h.store(own + i);
      });
      grads.theta[t - 1] = own[t - 1];
      grads.keep[t - 1] = sum_of(of_keep);
      grads.eta[t - 1] = sum_of(of_eta);
      each_vector<T>(stride_, [&](int64_t i) { (Vector<T>::loadu(own + i) * eta).store(own + i); });
    }
  }

 private:
  T* momentum(int64_t t) { return momentum_.data() + t * stride_; }
  T* weights(int64_t t) { return weights_.data() + t * stride_; }

  void add_row(const T* from, std::vector<T>& to) {
    each_vector<T>(tokens_, [&](int64_t i) { (Vector<T>::loadu(from + i) + Vector<T>::loadu(&to[i])).store(&to[i]); });
  }

  void run(const Gates<const T>& gates) {
    std::fill_n(momentum(0), stride_, T(0));
    std::fill_n(weights(0), stride_, T(0));
    momentum(0)[tokens_] = 1;
    weights(0)[tokens_ + 1] = 1;
    for (int64_t t = 1; t <= tokens_; ++t) {
      const Vector<T> keep(gates.keep[t - 1]), eta(gates.eta[t - 1]);
      const Vector<T> apply(gates.apply == nullptr ? T(1) : gates.apply[t - 1]);
      const T *weights_before = weights(t - 1), *momentum_before = momentum(t - 1);
      T *n = momentum(t), *g = weights(t);
      each_vector<T>(stride_, [&](int64_t i) { (Vector<T>::loadu(momentum_before + i) * eta).store(n + i); });
      n[t - 1] += gates.theta[t - 1];
      each_vector<T>(stride_, [&](int64_t i) {
        at::vec::fmadd(Vector<T>::loadu(weights_before + i), keep, Vector<T>::loadu(n + i) * apply).store(g + i);
      });
    }
  }

  const int64_t tokens_, blocks_, stride_;
  std::vector<T> momentum_, weights_, d_momentum_, d_weights_;
};

}  // namespace memzoo
