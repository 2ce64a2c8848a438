// Loads and stores of fewer than 16 lanes, where there are no masks for them.
#pragma once

namespace came8bit {
namespace CAME8BIT_ISA {

// Copies `size` < 16 values in pieces of fixed size: short rows are often of one of these.
template <class T>
CAME8BIT_INLINE void copy_part(const T* from, int size, T* to) {
  int done = 0;
  if (size & 8) {
    memcpy(to, from, 8 * sizeof(T));
    done = 8;
  }
  if (size & 4) {
    memcpy(to + done, from + done, 4 * sizeof(T));
    done += 4;
  }
  if (size & 2) {
    memcpy(to + done, from + done, 2 * sizeof(T));
    done += 2;
  }
  if (size & 1) to[done] = from[done];
}

// `size` < 16 values, the other lanes zero. Eight, the rank of many adapters, have a way of their
// own: a vector that is loaded from memory just written in smaller parts has to wait for them.
template <class T>
CAME8BIT_INLINE auto load_part(const T* p, int size) -> decltype(load(p)) {
  if (size == 8) return load_eight(p);
  T lanes[kLanes];
  memset(lanes, 0, sizeof lanes);
  copy_part(p, size, lanes);
  return load(lanes);
}

template <class T, class V>
CAME8BIT_INLINE void store_part(T* p, V value, int size) {
  T lanes[kLanes];
  store(lanes, value);
  copy_part(lanes, size, p);
}

}  // namespace CAME8BIT_ISA
}  // namespace came8bit
