// A short causal convolution, one filter a channel, and what follows from its gradient, in one pass over memory each.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "products.h"

namespace memzoo {
namespace {

using at::Tensor;

// Slots that are worked on at a time, so that they stay in a core's cache.
constexpr int64_t kSlots = 64;

// Taps (width, channels) and a bias, or none.
template <typename T>
struct Filter {
  const T *taps, *bias;
  int64_t width, channels;
  bool has_silu;

  // What goes into the activation at a token whose inputs, the earliest first, are ``rows``, of ``count`` channels from
  // ``c`` on.
  Vector<T> sum(const T* const* rows, int64_t c, int64_t count) const {
    Vector<T> z = bias == nullptr ? Vector<T>(T(0)) : Vector<T>::loadu(bias + c, count);
    for (int64_t i = 0; i < width; ++i) {
      const Vector<T> tap = Vector<T>::loadu(taps + i * channels + c, count);
      z = at::vec::fmadd(tap, Vector<T>::loadu(rows[i] + c, count), z);
    }
    return z;
  }
};

// The channels of slot ``slot`` in row ``row``, of which the first are ``tail``'s (batch, width - 1, channels), the
// others x's (batch, time, channels).
template <typename T>
T* slot_of(const Tensor& x, const Tensor& tail, int64_t row, int64_t slot) {
  const int64_t before = tail.size(1), channels = x.size(2);
  if (slot < before) return tail.data_ptr<T>() + (row * before + slot) * channels;
  return x.data_ptr<T>() + (row * x.size(1) + slot - before) * channels;
}

template <typename T>
Filter<T> filter_of(const Tensor& taps, const std::optional<Tensor>& bias, bool has_silu) {
  const T* own_bias = bias ? bias->data_ptr<T>() : nullptr;
  return {taps.data_ptr<T>(), own_bias, taps.size(0), taps.size(1), has_silu};
}

// Call ``pass(c, count)`` for every vector of channels; the last may have fewer.
template <typename T, typename Pass>
void each_channel(int64_t channels, const Pass& pass) {
  const int64_t whole = channels / Vector<T>::size() * Vector<T>::size();
  for (int64_t c = 0; c < whole; c += Vector<T>::size()) pass(c, std::integral_constant<int64_t, Vector<T>::size()>());
  if (whole < channels) pass(whole, channels - whole);
}

template <typename T>
Vector<T> sigmoid(const Vector<T>& z) {
  return Vector<T>(T(1)) / (Vector<T>(T(1)) + z.neg().exp());
}

int64_t parts_of(int64_t slots) { return (slots + kSlots - 1) / kSlots; }

// Fill y (batch, time, channels).
void short_conv(Tensor x, Tensor tail, Tensor taps, std::optional<Tensor> bias, bool has_silu, Tensor y) {
  AT_DISPATCH_FLOATING_TYPES(y.scalar_type(), "short_conv", [&] {
    using V = Vector<scalar_t>;
    const auto filter = filter_of<scalar_t>(taps, bias, has_silu);
    const int64_t time = y.size(1), channels = filter.channels, parts = parts_of(time);
    at::parallel_for(0, y.size(0) * parts, 1, [&](int64_t begin, int64_t end) {
      std::vector<const scalar_t*> rows(filter.width);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t row = task / parts, first = task % parts * kSlots;
        for (int64_t t = first; t < std::min(first + kSlots, time); ++t) {
          for (int64_t i = 0; i < filter.width; ++i) rows[i] = slot_of<scalar_t>(x, tail, row, t + i);
          scalar_t* to = y.data_ptr<scalar_t>() + (row * time + t) * channels;
          each_channel<scalar_t>(channels, [&](int64_t c, auto count) {
            const V z = filter.sum(rows.data(), c, count);
            (has_silu ? z * sigmoid(z) : z).store(to + c, count);
          });
        }
      }
    });
  });
}

// Fill d_x and d_tail, and d_taps (batch, parts, width + 1, channels) with parts of the sums over tokens, last that of
// the bias.
void short_conv_gradients(
    Tensor x, Tensor tail, Tensor taps, std::optional<Tensor> bias, bool has_silu, Tensor d_y, Tensor d_x,
    Tensor d_tail, Tensor d_taps) {
  AT_DISPATCH_FLOATING_TYPES(d_y.scalar_type(), "short_conv_gradients", [&] {
    using V = Vector<scalar_t>;
    const auto filter = filter_of<scalar_t>(taps, bias, has_silu);
    const int64_t time = d_y.size(1), channels = filter.channels, width = filter.width, slots = time + width - 1;
    const int64_t parts = parts_of(slots);
    TORCH_CHECK(d_taps.size(1) == parts, "room for ", d_taps.size(1), " parts of the sums; there are ", parts);
    at::parallel_for(0, d_y.size(0) * parts, 1, [&](int64_t begin, int64_t end) {
      Room<scalar_t> room((kSlots + width) * channels);
      std::vector<const scalar_t*> rows(width);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t row = task / parts, first = task % parts * kSlots, last = std::min(first + kSlots, slots);
        const int64_t earliest = std::max<int64_t>(first - width + 1, 0);
        scalar_t* sums = d_taps.data_ptr<scalar_t>() + task * (width + 1) * channels;
        std::fill_n(sums, (width + 1) * channels, scalar_t(0));
        const auto d_z = [&](int64_t t) { return room.data() + (t - earliest) * channels; };
        for (int64_t t = earliest; t < std::min(last, time); ++t) {
          for (int64_t i = 0; i < width; ++i) rows[i] = slot_of<scalar_t>(x, tail, row, t + i);
          const scalar_t* given = d_y.data_ptr<scalar_t>() + (row * time + t) * channels;
          each_channel<scalar_t>(channels, [&](int64_t c, auto count) {
            V d = V::loadu(given + c, count);
            if (has_silu) {
              const V z = filter.sum(rows.data(), c, count), s = sigmoid(z);
              d = d * at::vec::fmadd(z * s, V(scalar_t(1)) - s, s);
            }
            d.store(d_z(t) + c, count);
            if (t < first) return;  // a token of the part before
            for (int64_t i = 0; i < width; ++i) {
              scalar_t* sum = sums + i * channels + c;
              at::vec::fmadd(d, V::loadu(rows[i] + c, count), V::loadu(sum, count)).store(sum, count);
            }
            scalar_t* sum = sums + width * channels + c;
            (V::loadu(sum, count) + d).store(sum, count);
          });
        }
        for (int64_t slot = first; slot < last; ++slot) {
          scalar_t* to = slot_of<scalar_t>(d_x, d_tail, row, slot);
          each_channel<scalar_t>(channels, [&](int64_t c, auto count) {
            V sum(scalar_t(0));
            for (int64_t i = std::max<int64_t>(slot - time + 1, 0); i < std::min(width, slot + 1); ++i) {
              const V tap = V::loadu(filter.taps + i * channels + c, count);
              sum = at::vec::fmadd(tap, V::loadu(d_z(slot - i) + c, count), sum);
            }
            sum.store(to + c, count);
          });
        }
      }
    });
  });
}

TORCH_LIBRARY_FRAGMENT(memzoo_cpp, library) {
  library.def("short_conv", &short_conv);
  library.def("short_conv_gradients", &short_conv_gradients);
}

}  // namespace
}  // namespace memzoo
