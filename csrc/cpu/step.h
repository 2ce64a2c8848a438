// One CAME step of a list of parameters, given as plain pointers.
#pragma once

#include <vector>

#include "../param_arguments.h"
#include "../step_settings.h"
#include "strided.h"

namespace came8bit {

struct Parameter : ParamArguments {
  StridedRuns param, grad;
};

// The byte with a packed code; a slice takes whole bytes.
inline uint8_t* packed_codes(const Parameter& p, int64_t slice, int64_t in_slice) {
  return static_cast<uint8_t*>(p.exp_avg) + slice * bytes_of_slice(p.slice_len, p.bits) +
         in_slice * p.bits / 8;
}
inline uint8_t* packed_codes(const Parameter& p, int64_t e) {
  const int64_t slice = e / p.slice_len;
  return packed_codes(p, slice, e - slice * p.slice_len);
}

// How many codes its byte has before that of a value.
inline int codes_before(const Parameter& p, int64_t in_slice) {
  return p.bits == 0 ? 0 : static_cast<int>(in_slice % (8 / p.bits));
}

// Whether every row begins with a block of codes and its last one fills a byte, so that kernels
// find the codes of any row.
inline bool codes_begin_with_rows(const Parameter& p) {
  if (p.bits == 0 || p.bits == 32) return false;
  const int64_t block_size = p.coarse() ? kCoarseBlock : kBlockSize;
  return p.k % block_size == 0 || (p.slice_len == p.k && p.k * p.bits % 8 == 0);
}

inline const CoarseCode& coarse_code(const Parameter& p) {
  const Kernels& table = kernels();
  return p.bits == 4 ? table.code4 : p.bits == 2 ? table.code2 : table.code0;
}
inline uint16_t* scales_of(const Parameter& p, int64_t block) {
  return p.scales + block * scales_of_block(p.bits);
}

// One of which only some rows may be here: a pass writes `sums`, which are added over the ranks,
// and the next one reads them as `reduced`. `work` stays here.
struct Shared : Parameter, SharedArguments {};

void factored_step(const std::vector<Parameter>& parameters, const StepSettings& settings);
void unfactored_step(const std::vector<Parameter>& parameters, const StepSettings& settings);
void factored_pass(Pass pass, const std::vector<Shared>& parameters, const StepSettings& settings);
void unfactored_pass(Pass pass, const std::vector<Shared>& parameters,
                     const StepSettings& settings);

// Codec of contiguous memory: slices x slice_len values.
void quantize(const float* x, int64_t slices, int64_t slice_len, int8_t* codes, float* absmax);
void dequantize(const int8_t* codes, const float* absmax, int64_t slices, int64_t slice_len,
                float* x);

}  // namespace came8bit
