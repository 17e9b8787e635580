// The files that include PyTorch's headers, which take 10 s to compile, as one.
#include "add_rms_norm.cpp"
#include "conv.cpp"
#include "conv2d.cpp"
#include "linear.cpp"
#include "module.cpp"
#include "norm_gate.cpp"
#include "scan.cpp"
#include "scattn_sum.cpp"
