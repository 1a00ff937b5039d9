// What CUDA's headers declare and PyTorch's headers refer to, and nothing here calls.
#define ABSENT(name) \
  extern "C" void name() { __builtin_trap(); }
ABSENT(cudaDeviceSynchronize)
ABSENT(cudaEventCreateWithFlags)
ABSENT(cudaEventDestroy)
ABSENT(cudaEventElapsedTime)
ABSENT(cudaEventQuery)
ABSENT(cudaEventRecord)
ABSENT(cudaEventSynchronize)
ABSENT(cudaGetErrorString)
ABSENT(cudaGetLastError)
ABSENT(cudaStreamWaitEvent)
