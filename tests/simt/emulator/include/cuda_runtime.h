// Found in place of CUDA's own header in a build for the emulator.
#pragma once
#include "emulator/cuda.h"
