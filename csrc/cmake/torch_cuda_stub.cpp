// Stands in for libtorch_cuda.so when _C_cuda is linked; never shipped and never run. It names all
// that _C_cuda may use of that library, so a build against a CPU torch gives the same file as one
// against a CUDA torch, and the linker refuses any other symbol. Declared in
// torch/csrc/inductor/aoti_torch/c/shim.h.
#include <cstdint>

extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t /*device*/, void** stream) {
  *stream = nullptr;
  return 1;
}
