// All kernels for one instruction set. Included once per set, with
//   ISA         name of the InstructionSet to define
//   ISA_BYTES   width of a vector
//   ISA_STATES  states of one channel block that the forward scan keeps in registers (a power of two)
// and, for AVX-512, ISA_AVX512.

#include "vector.h"

#include "add_rms_norm_kernel.h"
#include "columns.h"
#include "conv_kernel.h"
#include "scan_kernel.h"
#include "scattn_sum_kernel.h"

namespace mmlocalmamba {
namespace {

template <typename T>
constexpr Kernels<T> kKernels = {
    {kBlocks * kLanes<T>, scan_scratch<T>, scan_forward<T>, scan_backward<T>},
    {kBlocks * kLanes<T>, conv_scratch<T>, conv_forward<T>, conv_backward<T>},
    {scattn_scratch<T>, scattn_statistics<T>, scattn_forward<T>, scattn_reduce<T>, scattn_backward<T>, gate_product<T>},
    add_rms_norm<T>,
};

}  // namespace

const InstructionSet ISA = {ISA_NAME, kKernels<float>, kKernels<double>};

}  // namespace mmlocalmamba
