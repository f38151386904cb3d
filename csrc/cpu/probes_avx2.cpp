#define FLATKERN_ISA avx2
#define FLATKERN_ISA_NAME "avx2"
#define FLATKERN_VECTOR_BYTES 32
#include "probes.h"
