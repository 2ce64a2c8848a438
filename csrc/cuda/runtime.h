// What launchers need of the CUDA runtime and of torch: launches with their errors, the current
// stream and device, and the few properties of a device that decide how work is divided.
//
// With CAME8BIT_SHIM the same sources are compiled for the CPU, by a C++ compiler (tests/shim):
// kernels then run on CPU tensors, under the namespace came8bit_shim.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <map>
#include <mutex>
#elif defined(CAME8BIT_SHIM)
#include "cuda_shim.h"
#else
#error "compile this with nvcc, or for the CPU through tests/shim/CMakeLists.txt"
#endif

// Where the operators are registered: CAME8BIT_LIBRARY_IMPL(m) { m.impl(...); }
#if defined(CAME8BIT_SHIM)
#define CAME8BIT_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(came8bit_shim, CPU, m)
#else
#define CAME8BIT_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(came8bit, CUDA, m)
#endif

namespace came8bit {

struct DeviceProperties {
  int64_t l2_bytes;
  double bytes_per_second;  // of the memory; 0: the driver does not say
  bool large_arguments;     // whether kernels may take 32 KB of them, not 4: drivers from R530 on
};

// Throws with the text of a CUDA error. `what` was being done; `cure` says what to try.
inline void check_cuda(cudaError_t error, const char* what,
                       const char* cure =
                           "run again with CUDA_LAUNCH_BLOCKING=1, so that the "
                           "error of an earlier kernel is not blamed on this") {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error), " (",
                  cudaGetErrorName(error), "); ", cure);
}

#if defined(CAME8BIT_SHIM)

constexpr const char* kDeviceName = "CPU";

inline bool is_device_tensor(const torch::stable::Tensor& t) {
  return t.is_cpu();
}

// There is one device.
class DeviceGuard {
 public:
  explicit DeviceGuard(const torch::stable::Tensor&) {}
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
};

inline cudaStream_t current_stream(const torch::stable::Tensor&) {
  return nullptr;
}

inline DeviceProperties device_properties(const torch::stable::Tensor&) {
  return {came8bit_shim::l2_bytes(), 0.0, came8bit_shim::large_arguments()};
}

// Runs the grid, and returns when it is done. The arguments are converted to the kernel's types.
template <class... P>
void launch(void (*kernel)(P...), unsigned blocks, unsigned threads, cudaStream_t,
            std::common_type_t<P>... arguments) {
  came8bit_shim::run_grid(kernel, blocks, threads, arguments...);
}

#else

constexpr const char* kDeviceName = "CUDA";

inline bool is_device_tensor(const torch::stable::Tensor& t) {
  return t.is_cuda();
}

// Makes the device of a tensor the current one; the destructor puts the old one back.
class DeviceGuard {
 public:
  explicit DeviceGuard(const torch::stable::Tensor& t) : guard_(t.get_device_index()) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

// The stream that torch uses now on the device of a tensor.
inline cudaStream_t current_stream(const torch::stable::Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Of the device of a tensor; asked of the driver once, since some answers take it a millisecond.
// Neither synchronises nor disturbs a capture.
inline DeviceProperties device_properties(const torch::stable::Tensor& t) {
  static std::mutex mutex;
  static std::map<int, DeviceProperties> known;
  const int device = t.get_device_index();
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  int l2_bytes = 0, kilohertz = 0, bits = 0, driver = 0;
  check_cuda(cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, device),
             "cache size of the device");
  check_cuda(cudaDriverGetVersion(&driver), "version of the driver");
  if (cudaDeviceGetAttribute(&kilohertz, cudaDevAttrMemoryClockRate, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bits, cudaDevAttrGlobalMemoryBusWidth, device) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    kilohertz = 0;
  }
  return known[device] = {l2_bytes, 2.0 * 1000.0 * kilohertz * bits / 8, driver >= 12010};
}

// <<<blocks, threads, 0, stream>>> with the error checked. The arguments are converted to the
// kernel's types. Throws where the device or this build cannot run the kernel.
template <class... P>
void launch(void (*kernel)(P...), unsigned blocks, unsigned threads, cudaStream_t stream,
            std::common_type_t<P>... arguments) {
  kernel<<<blocks, threads, 0, stream>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
  const char* name = "a kernel";
#if CUDART_VERSION >= 12030
  if (cudaFuncGetName(&name, reinterpret_cast<const void*>(kernel)) != cudaSuccess) {
    name = "a kernel";
    static_cast<void>(cudaGetLastError());
  }
#endif
  const bool no_code =
      error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion;
  STD_TORCH_CHECK(
      false, "launch of ", name, " with ", blocks, " blocks of ", threads,
      " threads: ", cudaGetErrorString(error), " (", cudaGetErrorName(error), "); ",
      no_code ? "came8bit was compiled for other GPUs: reinstall it from source on this machine"
              : "run again with CUDA_LAUNCH_BLOCKING=1, so that the error of an earlier kernel is "
                "not blamed on this one");
}

#endif

}  // namespace came8bit
