// Planted: two blocks of 1024 threads a multiprocessor leave a thread 32 registers, and these 40
// sums need more.
#if defined(PLANTED)
#define BLOCKS 2
#else
#define BLOCKS 1
#endif

__global__ void __launch_bounds__(1024, BLOCKS) sums(const float* x, int n, float* y) {
  float sum[40];
#pragma unroll
  for (int i = 0; i < 40; ++i) sum[i] = y[i * 1024 + threadIdx.x];
  for (int k = 0; k < n; ++k) {
    const float value = x[k * 1024 + threadIdx.x];
#pragma unroll
    for (int i = 0; i < 40; ++i) sum[i] += value * sum[(i + 1) % 40];
  }
#pragma unroll
  for (int i = 0; i < 40; ++i) y[i * 1024 + threadIdx.x] = sum[i];
}
