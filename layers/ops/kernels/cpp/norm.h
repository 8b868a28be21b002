// The LayerNorm around a memory's network, a token at a time; see ``memzoo.layers.ops.neural_memory_norm``.
#pragma once

#include <cmath>

#include "products.h"

namespace memzoo {

template <typename T>
inline T mean(int64_t width, const T* x) {
  Vector<T> sum(T(0));
  each_vector<T>(width, [&](int64_t i) { sum = sum + Vector<T>::loadu(x + i); });
  return sum_of(sum) / static_cast<T>(width);
}

// to = x without its mean and its part along ``normal``.
template <typename T>
inline void project(int64_t width, const T* x, const T* normal, T* to) {
  const Vector<T> centre(mean(width, x)), along(dot(width, x, normal) / static_cast<T>(width));
  each_vector<T>(width, [&](int64_t i) {
    (Vector<T>::loadu(x + i) - centre - Vector<T>::loadu(normal + i) * along).store(to + i);
  });
}

// Normalise z and return its deviation.
template <typename T>
inline T normalise(int64_t width, const T* z, T* normal) {
  const Vector<T> centre(mean(width, z));
  each_vector<T>(width, [&](int64_t i) { (Vector<T>::loadu(z + i) - centre).store(normal + i); });
  const T deviation = std::sqrt(dot(width, normal, normal) / static_cast<T>(width) + T(1e-6));
  const Vector<T> divisor(deviation);
  each_vector<T>(width, [&](int64_t i) { (Vector<T>::loadu(normal + i) / divisor).store(normal + i); });
  return deviation;
}

// What ``gradient_backward`` reads and writes of a token, a row each; d_gain and d_bias are added to.
template <typename T>
struct Normed {
  const T *normal, *error, *gain;
  T deviation;
  T *d_gain, *d_bias;
};

// to = minus the gradient at z of half the squared error; ``room`` is for a row.
template <typename T>
inline void negative_gradient(int64_t width, const Normed<T>& at, T* to, T* room) {
  each_vector<T>(width, [&](int64_t i) {
    (Vector<T>::loadu(at.gain + i) * Vector<T>::loadu(at.error + i)).store(room + i);
  });
  project(width, room, at.normal, to);
  const Vector<T> divisor(-at.deviation);
  each_vector<T>(width, [&](int64_t i) { (Vector<T>::loadu(to + i) / divisor).store(to + i); });
}

// From d, the gradient of ``negative_gradient``, to minus that of z, in its place, and to that of the error; ``room``
// is for three rows.
template <typename T>
inline void gradient_backward(int64_t width, const Normed<T>& at, T* d, T* d_error, T* room) {
  using V = Vector<T>;
  T *u = room, *part = room + width, *d_normal = room + 2 * width;
  const V divisor(at.deviation);
  each_vector<T>(width, [&](int64_t i) {
    V::loadu(d + i).neg().store(d + i);
    (V::loadu(at.gain + i) * V::loadu(at.error + i)).store(u + i);
  });
  const T count = static_cast<T>(width);
  const V along_u(dot(width, u, at.normal) / count), along_d(dot(width, d, at.normal) / count);
  project(width, d, at.normal, part);
  each_vector<T>(width, [&](int64_t i) {
    const V d_u = V::loadu(part + i) / divisor, gain = V::loadu(at.gain + i);
    const V own = gain * d_u;
    own.store(d_error + i);
    (V::loadu(at.d_gain + i) + d_u * V::loadu(at.error + i) + own * V::loadu(at.normal + i)).store(at.d_gain + i);
    (V::loadu(at.d_bias + i) + own).store(at.d_bias + i);
    const V both = along_d * V::loadu(u + i) + along_u * V::loadu(d + i);
    (gain * own - both / divisor).store(d_normal + i);
  });
  project(width, u, at.normal, part);
  const V of_deviation(dot(width, d, part) / count / (at.deviation * at.deviation));
  project(width, d_normal, at.normal, part);
  each_vector<T>(width, [&](int64_t i) {
    (of_deviation * V::loadu(at.normal + i) - V::loadu(part + i) / divisor).store(d + i);
  });
}

}  // namespace memzoo
