#define FLATKERN_ISA avx512
#define FLATKERN_ISA_NAME "avx512"
#define FLATKERN_VECTOR_BYTES 64
#include "probes.h"
