// What this library was built with, for came8bit/ops/libraries.py.

extern "C" {

// Version of nvcc, "13.0.88".
__attribute__((visibility("default"))) const char* came8bit_cuda_nvcc() {
  return CAME8BIT_NVCC_VERSION;
}

// "sm_80 sm_90 compute_90": machine code for these GPUs, and PTX that newer ones can run.
__attribute__((visibility("default"))) const char* came8bit_cuda_architectures() {
  return CAME8BIT_CUDA_ARCHITECTURES;
}
}
