// The one header of c10/cuda that PyTorch's build for the CPU does not bring: CMake writes it in a build for CUDA.
#pragma once
#define C10_CUDA_BUILD_SHARED_LIBS
