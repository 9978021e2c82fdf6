/* The machine's own speed at reading two arrays: what the criticality kernels are measured against.
 * Built by stream.py for the machine it runs on; no part of the package. */
#include <stdint.h>

double stream(const float* a, const float* b, int64_t n, int threads) {
  double total = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : total) schedule(static)
  for (int64_t block = 0; block < n / 4096; block++) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = block * 4096; i < block * 4096 + 4096; i++) sum += a[i] * b[i];
    total += sum;
  }
  return total;
}
