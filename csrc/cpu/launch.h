// Which ISA level's kernels run. Torch-free, so that module.cpp can tell about it.
#pragma once

#include "kernels.h"

namespace fastformer::cpu {

// The kernels in use: at first the best level that was compiled and that the machine has.
const Kernels& kernels();

const char* isa_level();

// Takes another level, for tests; false where it was not compiled or the machine lacks it. Not to be called
// while kernels run.
bool set_isa_level(const char* level);

}  // namespace fastformer::cpu
