// Planted: an index known only at run time, which sends an array from registers to memory.
__global__ void histogram(const int* bins, int n, int* y) {
  int counts[8] = {};
  for (int k = 0; k < n; ++k) {
    const int bin = bins[k * blockDim.x + threadIdx.x];
#if defined(PLANTED)
    counts[bin] += 1;
#else
#pragma unroll
    for (int i = 0; i < 8; ++i) counts[i] += i == bin ? 1 : 0;
#endif
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) y[i * blockDim.x + threadIdx.x] = counts[i];
}
