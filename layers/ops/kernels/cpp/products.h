// Products of small row-major matrices that lie in a core's cache, and the passes between them.
//
// What a library of linear algebra gives for large matrices it does not give for these: a call of its own costs as much
// as the product of two of 64 by 64, and what is added or scaled afterwards is one more pass. All widths are multiples
// of 16, which every vector divides, and so are the numbers of rows.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace memzoo {

template <typename T>
using Vector = at::vec::Vectorized<T>;

// Numbers in memory, from the start of a line of the cache, or vectors would lie across two.
template <typename T>
class Room {
 public:
  explicit Room(int64_t size) : numbers_(size + kLine) {
    const auto place = reinterpret_cast<uintptr_t>(numbers_.data()) / sizeof(T);
    data_ = numbers_.data() + (kLine - place % kLine) % kLine;
  }
  Room(Room&&) = default;
  T* data() const { return data_; }

 private:
  static constexpr size_t kLine = 64 / sizeof(T);
  std::vector<T> numbers_;
  T* data_;
};

// Rows and vectors of the result that a pass over the inner index holds in registers, of which AVX-512 has 32.
constexpr int64_t kBlockRows = sizeof(Vector<float>) == 64 ? 8 : 4;
constexpr int64_t kBlockVectors = 2;

// What becomes of the product p: c = p, c += p, c -= p; c_t += scale_t p_t for every row t; or that and, on the way
// back through such a scale, dots_t += p_t . other_t, of which ``dots`` has a vector a row, to be summed in the end.
enum class Into { kSet, kAdd, kSubtract, kAddScaled, kPull };

template <typename T>
struct Scaling {
  const T* scale = nullptr;
  const T* other = nullptr;
  T* dots = nullptr;
};

// Where a triangular matrix of tokens by tokens (t, i), zero for i > t, stands: nowhere; as a (transposed or not), of
// which the zeros are passed over; as c, of which only blocks that reach the diagonal are written.
enum class Causal { kNone, kLeft, kResult };

template <typename T, Into INTO, bool TRANSPOSED, int64_t VECTORS>
inline void product_block(
    int64_t inner, const T* a, int64_t stride_a, const T* b, int64_t stride_b, T* c, int64_t stride_c,
    const Scaling<T>& scaling) {
  using V = Vector<T>;
  V sum[kBlockRows][VECTORS];
#pragma GCC unroll 8
  for (int64_t i = 0; i < kBlockRows; ++i) {
#pragma GCC unroll 8
    for (int64_t j = 0; j < VECTORS; ++j) {
      constexpr bool goes_on = INTO == Into::kAdd || INTO == Into::kSubtract;
      sum[i][j] = goes_on ? V::loadu(c + i * stride_c + j * V::size()) : V(T(0));
    }
  }
  for (int64_t k = 0; k < inner; ++k) {
    V row[VECTORS];
#pragma GCC unroll 8
    for (int64_t j = 0; j < VECTORS; ++j) row[j] = V::loadu(b + k * stride_b + j * V::size());
#pragma GCC unroll 8
    for (int64_t i = 0; i < kBlockRows; ++i) {
      const V factor(TRANSPOSED ? a[k * stride_a + i] : a[i * stride_a + k]);
#pragma GCC unroll 8
      for (int64_t j = 0; j < VECTORS; ++j) {
        sum[i][j] = INTO == Into::kSubtract ? at::vec::fnmadd(factor, row[j], sum[i][j])
                                            : at::vec::fmadd(factor, row[j], sum[i][j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < kBlockRows; ++i) {
    [[maybe_unused]] V dots(T(0));
    if constexpr (INTO == Into::kPull) dots = V::loadu(scaling.dots + i * V::size());
#pragma GCC unroll 8
    for (int64_t j = 0; j < VECTORS; ++j) {
      const int64_t at = i * stride_c + j * V::size();
      if constexpr (INTO == Into::kPull) dots = at::vec::fmadd(sum[i][j], V::loadu(scaling.other + at), dots);
      if constexpr (INTO == Into::kAddScaled || INTO == Into::kPull) {
        at::vec::fmadd(V(scaling.scale[i]), sum[i][j], V::loadu(c + at)).store(c + at);
      } else {
        sum[i][j].store(c + at);
      }
    }
    if constexpr (INTO == Into::kPull) dots.store(scaling.dots + i * V::size());
  }
}

template <typename T, Into INTO, bool TRANSPOSED, Causal CAUSAL, int64_t VECTORS>
inline void product_panel(
    int64_t rows, int64_t inner, const T* a, int64_t stride_a, const T* b, int64_t stride_b, T* c, int64_t stride_c,
    const Scaling<T>& scaling, int64_t column) {
  const int64_t first = CAUSAL == Causal::kResult ? column / kBlockRows * kBlockRows : 0;
  for (int64_t row = first; row < rows; row += kBlockRows) {
    int64_t begin = 0, end = inner;
    if (CAUSAL == Causal::kLeft && TRANSPOSED) begin = row;
    if (CAUSAL == Causal::kLeft && !TRANSPOSED) end = row + kBlockRows;
    const T* left = TRANSPOSED ? a + begin * stride_a + row : a + row * stride_a;
    const int64_t place = row * stride_c + column;
    Scaling<T> here;
    if (INTO == Into::kAddScaled || INTO == Into::kPull) here.scale = scaling.scale + row;
    if (INTO == Into::kPull) here.other = scaling.other + place, here.dots = scaling.dots + row * Vector<T>::size();
    product_block<T, INTO, TRANSPOSED, VECTORS>(
        end - begin, left, stride_a, b + begin * stride_b + column, stride_b, c + place, stride_c, here);
  }
}

// c (rows, columns) from a (rows, inner), which lies transposed if TRANSPOSED, and b (inner, columns); all dense.
template <typename T, Into INTO, bool TRANSPOSED = false, Causal CAUSAL = Causal::kNone>
void product(
    int64_t rows, int64_t inner, int64_t columns, const T* a, const T* b, T* c, const Scaling<T>& scaling = {}) {
  constexpr int64_t panel = kBlockVectors * Vector<T>::size();
  const int64_t stride_a = TRANSPOSED ? rows : inner;
  int64_t column = 0;
  for (; column + panel <= columns; column += panel) {
    product_panel<T, INTO, TRANSPOSED, CAUSAL, kBlockVectors>(
        rows, inner, a, stride_a, b, columns, c, columns, scaling, column);
  }
  for (; column < columns; column += Vector<T>::size()) {
    product_panel<T, INTO, TRANSPOSED, CAUSAL, 1>(rows, inner, a, stride_a, b, columns, c, columns, scaling, column);
  }
}

// to (columns, rows) = from (rows, columns)^T.
template <typename T>
void transpose(int64_t rows, int64_t columns, const T* from, T* to) {
  for (int64_t i = 0; i < rows; i += 16) {
    for (int64_t j = 0; j < columns; j += 16) {
      at::vec::transpose_mxn<T, 16, 16>(from + i * columns + j, columns, to + j * rows + i, rows);
    }
  }
}

// Call ``pass(offset)`` for every vector of ``size`` numbers.
template <typename T, typename Pass>
inline void each_vector(int64_t size, const Pass& pass) {
  for (int64_t i = 0; i < size; i += Vector<T>::size()) pass(i);
}

// Numbers of row t of a triangular matrix that products write and read: up to the end of the vector or block, whichever
// is longer, that holds the diagonal.
template <typename T>
inline int64_t causal_width(int64_t t) {
  constexpr int64_t step = std::max<int64_t>(Vector<T>::size(), kBlockRows);
  static_assert(16 % Vector<T>::size() == 0 && 16 % kBlockRows == 0);
  return (t / step + 1) * step;
}

template <typename T>
inline T sum_of(const Vector<T>& v) {
  return at::vec::vec_reduce_all<T>([](Vector<T>& x, Vector<T>& y) { return x + y; }, v);
}

template <typename T>
inline T dot(int64_t size, const T* a, const T* b) {
  Vector<T> sum(T(0));
  each_vector<T>(size, [&](int64_t i) {
    sum = at::vec::fmadd(Vector<T>::loadu(a + i), Vector<T>::loadu(b + i), sum);
  });
  return sum_of(sum);
}

// to_t = scale_t from_t, row by row.
template <typename T>
void scale_rows(int64_t rows, int64_t columns, const T* from, const T* scale, T* to) {
  for (int64_t t = 0; t < rows; ++t) {
    const Vector<T> factor(scale[t]);
    each_vector<T>(columns, [&](int64_t i) {
      (Vector<T>::loadu(from + t * columns + i) * factor).store(to + t * columns + i);
    });
  }
}

// to_t = the sum of vector t.
template <typename T>
void sum_vectors(int64_t rows, const T* vectors, T* to) {
  for (int64_t t = 0; t < rows; ++t) to[t] = sum_of(Vector<T>::loadu(vectors + t * Vector<T>::size()));
}

}  // namespace memzoo
