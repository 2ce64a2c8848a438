#define CAME8BIT_ISA baseline
#include "all.h"

namespace came8bit {
CAME8BIT_DEFINE_KERNELS(kernels_baseline);
}
