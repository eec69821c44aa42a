// SPDX-License-Identifier: Apache-2.0
#include "compand.h"

PQ_ISA_NAMESPACE_BEGIN

void compand_levels(int8_t* q, int64_t begin, int64_t end) { compand_row(q + begin, end - begin); }

PQ_ISA_NAMESPACE_END
