// All kernels for one instruction set. Included once per set, with
//   ISA         name of the InstructionSet to define
//   ISA_BYTES   width of a vector
//   ISA_STATES  states of one channel block that the forward scan keeps in registers (a power of two)
// and, for AVX-512, ISA_AVX512 and
//   ISA_SCALED  name of a second InstructionSet, whose forward scan computes exponentials in the way Exp2::scaled

#include "vector.h"

#include "add_rms_norm_kernel.h"
#include "columns.h"
#include "conv2d_kernel.h"
#include "conv_kernel.h"
#include "gelu_kernel.h"
#include "norm_gate_kernel.h"
#include "scan_kernel.h"
#include "scattn_sum_kernel.h"

namespace mmlocalmamba {
namespace {

template <typename S>
constexpr auto gelu_kernels() {
  decltype(Kernels<S>::gelu) found{};
  if constexpr (sizeof(Compute<S>) == 4) found = {gelu<S>, gelu_backward<S>};
  return found;
}

template <typename S, bool scaled = false, typename T = Compute<S>>
constexpr Kernels<S> kKernels = {
    {kBlocks * kLanes<T>, scan_scratch<T>, scan_forward<scaled && kHasTable<T>, S>, scan_backward<S>},
    {kBlocks * kLanes<T>, conv_scratch<T>, conv_forward<S>, conv_backward<S>},
    {scattn_scratch<T>, scattn_statistics<S>, scattn_forward<S>, scattn_reduce<S>, scattn_backward<S>, gate_product<T>},
    {norm_scratch<T>, add_rms_norm<S, S>, add_rms_norm<S, T>},
    {conv2d_scratch<S>, conv2d_forward<S>, conv2d_gradient<S>, conv2d_backward<S>},
    {norm_gate_scratch<T>, norm_gate_forward<S>, norm_gate_backward<S>},
    gelu_kernels<S>(),
};

}  // namespace

const InstructionSet ISA = {ISA_NAME, kKernels<float>, kKernels<double>, kKernels<bfloat16>};
#ifdef ISA_SCALED
const InstructionSet ISA_SCALED = {ISA_NAME "_scaled", kKernels<float, true>, kKernels<double>,
                                   kKernels<bfloat16, true>};
#endif

}  // namespace mmlocalmamba
