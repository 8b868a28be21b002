// What a chunk of one row reads besides its states.
#pragma once

#include <cstdint>

namespace memzoo {

// The fields of ``ChunkInputs`` for a row's chunk, or where their gradients go. Coefficients of block b lie b
// ``coefficient_stride`` further on, those of old block b in new block n k n + b ``transition_stride``.
template <typename P>
struct Fields {
  P *q, *k, *v, *mix, *read, *write, *transition;
  int64_t coefficient_stride, transition_stride;

  P* read_of(int64_t block) const { return read + block * coefficient_stride; }
  P* write_of(int64_t block) const { return write + block * coefficient_stride; }
};

}  // namespace memzoo
