#define FLATKERN_ISA baseline
#define FLATKERN_ISA_NAME "baseline"
#define FLATKERN_VECTOR_BYTES 16
#include "probes.h"
