// The activations of ``memzoo.layers.ops.activations`` and their first two derivatives.
#pragma once

#include <c10/util/Exception.h>

#include <string>

#include "products.h"

namespace memzoo {

// Fills value, slope and bend, each of which may be null, at the ``size`` numbers z.
template <typename T>
using Jet = void (*)(int64_t size, const T* z, T* value, T* slope, T* bend);

template <typename T>
struct Point {
  Vector<T> value, slope, bend;
};

template <typename T, Point<T> (*F)(const Vector<T>&)>
void fill(int64_t size, const T* z, T* value, T* slope, T* bend) {
  each_vector<T>(size, [&](int64_t i) {
    const Point<T> point = F(Vector<T>::loadu(z + i));
    if (value != nullptr) point.value.store(value + i);
    if (slope != nullptr) point.slope.store(slope + i);
    if (bend != nullptr) point.bend.store(bend + i);
  });
}

template <typename T>
inline Point<T> silu(const Vector<T>& z) {
  using V = Vector<T>;
  const V s = V(T(1)) / (V(T(1)) + z.neg().exp());
  const V value = z * s, rest = V(T(1)) - s;
  const V slope = s + value * rest;
  return {value, slope, rest * (slope + slope - value)};
}

template <typename T>
inline Point<T> gelu(const Vector<T>& z) {
  using V = Vector<T>;
  const V square = at::vec::minimum(z * z, V(T(4096)));  // an infinite one times a density of zero is no number
  const V density = (square * V(T(-0.5))).exp() * V(T(0.39894228040143267794));
  const V distribution = (V(T(1)) + (z * V(T(0.70710678118654752440))).erf()) * V(T(0.5));
  return {z * distribution, distribution + z * density, (V(T(2)) - square) * density};
}

template <typename T>
inline Point<T> relu(const Vector<T>& z) {
  using V = Vector<T>;
  const V on = V::blendv(V(T(0)), V(T(1)), z > V(T(0)));
  return {at::vec::maximum(z, V(T(0))), on, V(T(0))};
}

template <typename T>
inline Point<T> identity(const Vector<T>& z) {
  return {z, Vector<T>(T(1)), Vector<T>(T(0))};
}

template <typename T>
Jet<T> jet_of(const std::string& activation) {
  if (activation == "silu") return fill<T, silu<T>>;
  if (activation == "gelu") return fill<T, gelu<T>>;
  if (activation == "relu") return fill<T, relu<T>>;
  TORCH_CHECK(activation == "identity", "activation=", activation, " is none of silu, gelu, relu, identity");
  return fill<T, identity<T>>;
}

}  // namespace memzoo
