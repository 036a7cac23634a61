// One pass over memory: add HALO's gradient to that of the weights, and step lam by SGD with momentum.
// Compiled by utils/lambda_sgd.py, which states the formulas. The order of the operations, and where two are fused
// (fmaf), are those of torch's own, so that the results are the same to the last bit where torch fuses alike.
#include <cmath>
#include <cstdint>

static inline float sign(float x) { return float(x > 0) - float(x < 0); }

// Tensor k has sizes[k] elements at weights[k], gradients[k], lambdas[k] and momenta[k], all in one order.
extern "C" void halo_step(int64_t tensors, const int64_t* sizes, const float* const* weights, float* const* gradients,
                          float* const* lambdas, float* const* momenta, float xi, float psi, float lr, float momentum,
                          float weight_decay) {
#pragma omp parallel
    for (int64_t k = 0; k < tensors; ++k) {
        const float* w = weights[k];
        float *g = gradients[k], *lam = lambdas[k], *m = momenta[k];
#pragma omp for simd schedule(static) nowait
        for (int64_t i = 0; i < sizes[k]; ++i) {
            const float inverse = 1.0f / lam[i];
            const float strength = inverse * inverse * xi;
            g[i] += strength * sign(w[i]);
            const float slope = psi * sign(lam[i]) - 2.0f * (strength * inverse * std::fabs(w[i]));
            m[i] = momentum * m[i] + std::fmaf(weight_decay, lam[i], slope);
            lam[i] = std::fmaf(-lr, m[i], lam[i]);
        }
    }
}
