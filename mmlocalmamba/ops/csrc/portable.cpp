// Vectors of 16 bytes: SSE2, NEON, or whatever the compiler makes of them.
#define ISA kPortable
#define ISA_NAME "portable"
#define ISA_BYTES 16
#define ISA_STATES 8
#include "kernels.h"
