// All kernels for one instruction set. Included once per set, with
//   ISA         name of the InstructionSet to define
//   ISA_BYTES   width of a vector
//   ISA_STATES  states of one channel block that the forward scan keeps in registers (a power of two)
// and, for AVX-512, ISA_AVX512.

#include "vector.h"

#include "columns.h"
#include "conv_kernel.h"
#include "merge_kernel.h"
#include "scan_kernel.h"

namespace mmlocalmamba {

const InstructionSet ISA = {
    ISA_NAME,
    {{kBlocks * kLanes<float>, scan_scratch<float>, scan_forward<float>, scan_backward<float>},
     {kBlocks * kLanes<float>, conv_scratch<float>, conv_forward<float>, conv_backward<float>},
     {merge_scratch<float>, merge_statistics<float>, merge_forward<float>, merge_reduce<float>, merge_backward<float>,
      merge_product<float>},
     norm<float>},
    {{kBlocks * kLanes<double>, scan_scratch<double>, scan_forward<double>, scan_backward<double>},
     {kBlocks * kLanes<double>, conv_scratch<double>, conv_forward<double>, conv_backward<double>},
     {merge_scratch<double>, merge_statistics<double>, merge_forward<double>, merge_reduce<double>, merge_backward<double>,
      merge_product<double>},
     norm<double>},
};

}  // namespace mmlocalmamba
