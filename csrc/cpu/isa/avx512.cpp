#define CAME8BIT_ISA avx512
#include "all.h"

namespace came8bit {
CAME8BIT_DEFINE_KERNELS(kernels_avx512);
}
