// A parameter or gradient of any strides, read and written by runs of its row-major order.
#pragma once

#include "kernel_table.h"

namespace came8bit {

constexpr int kMaxDims = 24;

class StridedRuns {
 public:
  StridedRuns() = default;
  StridedRuns(void* data, int itemsize, int dims, const int64_t* sizes, const int64_t* strides)
      : data_(static_cast<char*>(data)), itemsize_(itemsize) {
    // Neighbouring dimensions that lie behind each other in memory become one.
    for (int d = 0; d < dims; ++d) {
      if (sizes[d] == 1) continue;
      if (dims_ > 0 && strides_[dims_ - 1] == sizes[d] * strides[d]) {
        sizes_[dims_ - 1] *= sizes[d];
        strides_[dims_ - 1] = strides[d];
      } else {
        sizes_[dims_] = sizes[d];
        strides_[dims_] = strides[d];
        ++dims_;
      }
    }
  }

  int itemsize() const { return itemsize_; }
  bool contiguous() const { return dims_ == 0 || (dims_ == 1 && strides_[0] == 1); }

  // Where element `e` is; only for a contiguous tensor.
  void* at(int64_t e) const { return data_ + e * itemsize(); }

  // `size` elements from `e` on: in place where contiguous, else copied to `buffer`.
  void* read(int64_t e, int64_t size, void* buffer) const {
    if (contiguous()) return at(e);
    itemsize() == 4 ? walk<uint32_t, false>(e, size, buffer)
                    : walk<uint16_t, false>(e, size, buffer);
    return buffer;
  }

  // Copies back what `read` gave out.
  void write(int64_t e, int64_t size, void* run) const {
    if (contiguous()) return;
    itemsize() == 4 ? walk<uint32_t, true>(e, size, run) : walk<uint16_t, true>(e, size, run);
  }

 private:
  template <class T, bool to_tensor>
  void walk(int64_t e, int64_t size, void* run) const {
    int64_t index[kMaxDims];
    int64_t offset = 0;
    for (int d = dims_ - 1; d >= 0; --d) {
      index[d] = e % sizes_[d];
      e /= sizes_[d];
      offset += index[d] * strides_[d];
    }
    T* base = reinterpret_cast<T*>(data_);
    T* out = static_cast<T*>(run);
    const int last = dims_ - 1;
    while (size > 0) {
      int64_t some = sizes_[last] - index[last];
      if (some > size) some = size;
      T* p = base + offset;
      for (int64_t i = 0; i < some; ++i, p += strides_[last]) {
        to_tensor ? * p = out[i] : out[i] = *p;
      }
      out += some;
      size -= some;
      offset += some * strides_[last];
      index[last] += some;
      for (int d = last; d > 0 && index[d] == sizes_[d]; --d) {
        offset += strides_[d - 1] - sizes_[d] * strides_[d];
        index[d] = 0;
        ++index[d - 1];
      }
    }
  }

  char* data_ = nullptr;
  int itemsize_ = 4;
  int dims_ = 0;
  int64_t sizes_[kMaxDims];  // of the first dims_
  int64_t strides_[kMaxDims];
};

}  // namespace came8bit
