// One pass over memory: add HALO's gradient to that of the weights, and step lam by SGD with momentum; and, where
// the weights' own momenta are given, step the weights too instead of writing their gradient back.
// Compiled by utils/halo/lambda_sgd.py, which states the formulas. The order of the operations, and where two are fused
// (fmaf), are those of torch's own, so that the results are the same to the last bit where torch fuses alike.
#include <cmath>
#include <cstdint>

struct Sgd {
    float lr, momentum, weight_decay;
};

static inline float sign(float x) { return float(x > 0) - float(x < 0); }

// Change one element and its momentum, given the gradient. Where its factor is 0, what there is of a momentum stays.
template <bool any_is_0>
static inline void descend(float& x, float& velocity, float gradient, Sgd sgd) {
    const bool stays = any_is_0 && sgd.momentum == 0.0f;
    const float step = sgd.momentum * (stays ? 0.0f : velocity) + std::fmaf(sgd.weight_decay, x, gradient);
    velocity = stays ? velocity : step;
    x = std::fmaf(-sgd.lr, step, x);
}

// Tensor k has sizes[k] elements at w[k], grad[k], lam[k], velocity[k], all in one order, and, unless w_velocity is
// null, at w_velocity[k]. `ceiling` is 1 over the floor under |lam|; a NaN passes it.
template <bool any_is_0>
static void pass(int64_t tensors, const int64_t* sizes, float* const* w, float* const* grad, float* const* lam,
                 float* const* velocity, float* const* w_velocity, float xi, float psi, float ceiling, Sgd of_lam,
                 Sgd of_w) {
#pragma omp parallel
    for (int64_t k = 0; k < tensors; ++k) {
        float *wk = w[k], *gk = grad[k], *lk = lam[k], *vk = velocity[k], *uk = w_velocity ? w_velocity[k] : nullptr;
        auto step = [=](int64_t i) {
            float inverse = 1.0f / lk[i];
            inverse = inverse > ceiling ? ceiling : inverse;
            inverse = inverse < -ceiling ? -ceiling : inverse;
            const float strength = inverse * inverse * xi;
            const float slope = psi * sign(lk[i]) - 2.0f * (strength * inverse * std::fabs(wk[i]));
            descend<any_is_0>(lk[i], vk[i], slope, of_lam);
            return gk[i] + strength * sign(wk[i]);
        };
        if (uk) {
#pragma omp for simd schedule(static) nowait
            for (int64_t i = 0; i < sizes[k]; ++i) descend<any_is_0>(wk[i], uk[i], step(i), of_w);
        } else {
#pragma omp for simd schedule(static) nowait
            for (int64_t i = 0; i < sizes[k]; ++i) gk[i] = step(i);
        }
    }
}

extern "C" void halo_step(int64_t tensors, const int64_t* sizes, float* const* w, float* const* grad,
                          float* const* lam, float* const* velocity, float* const* w_velocity, float xi, float psi,
                          float ceiling, Sgd of_lam, Sgd of_w) {
    // In loops of their own, so that the usual ones do not ask: one pass with the question took 8 to 10% longer.
    const bool any_is_0 = of_lam.momentum == 0.0f || (w_velocity && of_w.momentum == 0.0f);
    (any_is_0 ? pass<true> : pass<false>)(tensors, sizes, w, grad, lam, velocity, w_velocity, xi, psi, ceiling, of_lam,
                                          of_w);
}
